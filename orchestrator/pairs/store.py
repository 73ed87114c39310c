"""The pair store: Parquet files, and a manifest that is written last. Independent of models.

A store is a folder ``pairs/<digest of the spec>/``. A shard is one file, or several if the set has grown in the middle
of the shard. Files are written atomically and never changed, and count once the manifest (sha256, rows and NFE of every
file) names them. So a set can grow while others read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from orchestrator.errors import DamagedManifestError, DamagedShardError, StoreError
from orchestrator.pairs.pair_set import PairSet, concatenate
from orchestrator.pairs.spec import PairSpec, split_name
from orchestrator.storage import Storage
from solvers.trajectory import DensePath

ROW_GROUP = 256
PATH_COLUMNS = ("path_times", "path_states", "path_velocities")

MAX_PADDING = 64
"""Limit on how much padding to the longest trajectory may enlarge a shard, as a factor."""

SHARD_NAME = re.compile(r"shard-(?P<shard>[0-9]{5,10})(-(?P<start>[0-9]{1,12})-(?P<stop>[0-9]{1,12}))?\.parquet")

REMEDY = "run `bespoke pairs` on the same configuration: damaged shards are remade, the others are kept"


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's record of a file: a shard, or a part of one.

    Attributes:
        first: Index of the first pair.
        rows: Number of pairs.
        sha256: sha256 of the file.
        nfe: Velocity evaluations of each solver batch, in order.
    """

    first: int
    rows: int
    sha256: str
    nfe: tuple[int, ...]

    @property
    def indices(self) -> range:
        """Indices of its pairs."""
        return range(self.first, self.first + self.rows)

    @property
    def nfe_sum(self) -> int:
        """Velocity evaluations per pair (those of its batch), summed over the pairs."""
        return sum(self.nfe) * self.rows // len(self.nfe)


class PairStore:
    """The pairs of one spec under a storage root."""

    def __init__(self, storage: Storage, spec: PairSpec):
        self.storage = storage
        self.spec = spec
        self.folder = f"pairs/{spec.digest}"
        self.manifest_key = f"{self.folder}/manifest.json"

    def shard_key(self, indices: range) -> str:
        """Key of the file of these pairs: those of a whole shard, or a part of one, which the name then shows."""
        shard, start = divmod(indices.start, self.spec.shard_size)
        part = "" if len(indices) == self.spec.shard_size else f"-{start}-{start + len(indices)}"
        return f"{self.folder}/shard-{shard:05d}{part}.parquet"

    def present(self) -> list[range]:
        """Indices of the pairs in each file of the folder, by its name; the files may be damaged or overlap."""
        present = []
        for name in self.storage.names(self.folder):
            if (match := SHARD_NAME.fullmatch(name)) is None:
                continue
            start, stop = int(match["start"] or 0), int(match["stop"] or self.spec.shard_size)
            first = int(match["shard"]) * self.spec.shard_size
            if start < stop <= self.spec.shard_size and self._are_batches(start, stop - start):
                present.append(range(first + start, first + stop))
        return present

    def _are_batches(self, first: int, rows: int) -> bool:
        return rows > 0 and first % self.spec.batch_size == rows % self.spec.batch_size == 0

    @classmethod
    def open(cls, storage: Storage, name: str) -> PairStore:
        """Open the store of these pairs (:attr:`PairSpec.name`).

        Raises:
            StoreError: The store does not exist, or has fewer pairs.
            DamagedManifestError: The manifest is damaged.
        """
        digest, count = split_name(name)
        if not storage.exists(f"pairs/{digest}/manifest.json"):
            raise StoreError(f"no complete pair store {digest} under {storage.shown}; make it with `bespoke pairs`")
        spec, records = _read_manifest(storage, digest, count)
        if _rows(records) < count:
            raise StoreError(
                f"pair store {digest} under {storage.shown} has {_rows(records)} pairs, not {count}; make them with "
                f"`bespoke pairs`"
            )
        return cls(storage, spec)

    def is_complete(self) -> bool:
        """Whether the manifest names enough files for the needed pairs.

        Raises:
            DamagedManifestError: The manifest is damaged.
        """
        if not self.storage.exists(self.manifest_key):
            return False
        return _rows(self.all_records()) >= self.spec.count

    def records(self) -> list[ShardRecord]:
        """The manifest's records of the files that hold the needed pairs, in order of index.

        Raises:
            StoreError: The store is not complete.
            DamagedManifestError: The manifest is damaged.
        """
        if not self.is_complete():
            raise StoreError(f"pair store {self.storage.location(self.folder)} is not complete; {REMEDY}")
        return [record for record in self.all_records() if record.first < self.spec.count]

    def is_current(self) -> bool:
        """Whether the manifest, which must exist, has the present place of the conditioning."""
        spec, _ = _read_manifest(self.storage, self.spec.digest, self.spec.count)
        return spec == self.spec

    def all_records(self) -> list[ShardRecord]:
        """All records of the manifest, which must exist."""
        _, records = _read_manifest(self.storage, self.spec.digest, self.spec.count)
        return records

    def evaluations(self) -> int:
        """Velocity evaluations per pair (those of its batch), summed over the needed pairs."""
        nfe = [batch for record in self.records() for batch in record.nfe]
        batches = self.spec.batches(range(self.spec.count))
        return sum(spent * len(batch) for spent, batch in zip(nfe, batches, strict=False))

    def write_shard(self, first: int, pairs: PairSet) -> ShardRecord:
        """Write one file atomically: the pairs from index ``first`` on, a shard or a part of one.

        The bytes depend only on the spec and the values, not on the time or the host.

        Raises:
            StoreError: The storage is full; nothing is left behind.
        """
        indices = range(first, first + len(pairs))
        data = _to_parquet(self.spec, indices, pairs)
        self.storage.write(self.shard_key(indices), data)
        return self._record(indices, data, pairs)

    def inspect_shard(self, indices: range) -> ShardRecord | None:
        """The record of an intact file of these pairs; None if it is missing or damaged."""
        if not self.storage.exists(self.shard_key(indices)):
            return None
        data = self.storage.read(self.shard_key(indices))
        try:
            pairs = self._parse(indices, data)
        except DamagedShardError:
            return None
        # Page checksums do not cover the headers and the footer. The spec and the values determine all bytes, however.
        if not _to_parquet(self.spec, indices, pairs).equals(pa.py_buffer(data)):
            return None
        return self._record(indices, data, pairs)

    def _record(self, indices: range, data: bytes | pa.Buffer, pairs: PairSet) -> ShardRecord:
        nfe = tuple(pairs.nfe[:: self.spec.batch_size].tolist())
        return ShardRecord(indices.start, len(indices), hashlib.sha256(data).hexdigest(), nfe)

    def commit(self, records: Sequence[ShardRecord]) -> None:
        """Write the manifest, which makes the store complete.

        Raises:
            StoreError: Pairs are missing.
        """
        gaps = self.spec.gaps(record.indices for record in records)
        if gaps:
            raise StoreError(
                f"{sum(map(len, gaps))} of {self.spec.made} pairs are missing; the manifest is written last"
            )
        ordered = sorted(records, key=lambda record: record.first)
        self.storage.write_json(
            self.manifest_key,
            {"spec": self.spec.to_dict(), "shards": [dataclasses.asdict(record) for record in ordered]},
        )

    def is_whole(self, record: ShardRecord) -> bool:
        """Whether the file exists and has the record's sha256."""
        key = self.shard_key(record.indices)
        return self.storage.exists(key) and hashlib.sha256(self.storage.read(key)).hexdigest() == record.sha256

    def load(self) -> PairSet:
        """Load the needed pairs, in order of index.

        Raises:
            StoreError: The store is not complete.
            DamagedShardError: A file is missing or does not match the manifest.
        """
        return self._load(self.records(), range(self.spec.count))

    def load_shard(self, shard: int) -> PairSet:
        """Load the needed pairs of one shard of a complete store, in order of index.

        Raises:
            StoreError: See :meth:`load`.
        """
        indices = self.spec.shard_indices(shard)
        return self._load([record for record in self.records() if record.first in indices], indices)

    def _load(self, records: Sequence[ShardRecord], indices: range) -> PairSet:
        """The pairs with these indices from files that begin with the first of them."""
        parts: list[PairSet] = []
        for record in records:
            part = self._checked(record)
            first = parts[0].stored if parts else part.stored
            if (part.stored.shape[1:], part.stored.dtype) != (first.shape[1:], first.dtype):
                raise DamagedShardError(
                    f"conditions in shard {self.storage.location(self.shard_key(record.indices))} differ in shape or "
                    f"type from those in {self.storage.location(self.shard_key(records[0].indices))}: one of them is "
                    f"damaged; {REMEDY}"
                )
            parts.append(part)
        return concatenate(parts).select(slice(len(indices)))

    def _checked(self, record: ShardRecord) -> PairSet:
        key = self.shard_key(record.indices)
        if not self.storage.exists(key):
            raise DamagedShardError(f"shard {self.storage.location(key)} is missing; {REMEDY}")
        data = self.storage.read(key)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamagedShardError(
                f"shard {self.storage.location(key)} is damaged: {len(data):,} bytes with a sha256 that is not the "
                f"manifest's; {REMEDY}"
            )
        return self._parse(record.indices, data)

    def _parse(self, indices: range, data: bytes) -> PairSet:
        """Parse the bytes of a file and check them against the spec.

        Raises:
            DamagedShardError: The bytes are not Parquet, a page checksum is wrong, or the rows are not these pairs.
        """
        where = self.storage.location(self.shard_key(indices))
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            _check_layout(file, self.spec, len(indices))
            table = file.read()
            footer = table.schema.metadata or {}
            pairs = _from_table(table, self.spec)
            index = table.column("index").combine_chunks().to_numpy()
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise DamagedShardError(f"shard {where} is damaged: {error}; {REMEDY}") from error
        if footer.get(b"bespoke.spec") != self.spec.digest.encode():
            raise DamagedShardError(f"shard {where} belongs to another spec; {REMEDY}")
        if pairs.x0.shape[1:] != self.spec.shape or not np.array_equal(index, np.asarray(indices)):
            raise DamagedShardError(f"shard {where} does not hold pairs {indices.start} to {indices[-1]}; {REMEDY}")
        return pairs


def _rows(records: Sequence[ShardRecord]) -> int:
    return sum(record.rows for record in records)


def _read_manifest(storage: Storage, digest: str, count: int) -> tuple[PairSpec, list[ShardRecord]]:
    """The spec of ``count`` pairs of a set, and the records of its files, in order and without gaps."""
    key = f"pairs/{digest}/manifest.json"
    try:
        content = storage.read_json(key)
        spec = PairSpec.from_dict(content["spec"], count)
        records = [_as_record(record, spec.batch_size) for record in content["shards"]]
        ends = np.cumsum([0, *(record.rows for record in records)], dtype=object)
        # A file of a shard must end within it.
        fits = spec.digest == digest and bool(records)
        fits = fits and all(
            record.first == end and record.first // spec.shard_size == record.indices[-1] // spec.shard_size
            for record, end in zip(records, ends, strict=False)
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DamagedManifestError(f"manifest {storage.location(key)} is damaged: {error}; {REMEDY}") from error
    if not fits:
        raise DamagedManifestError(f"manifest {storage.location(key)} does not belong to its folder; {REMEDY}")
    return spec, records


def _as_record(content: dict[str, Any], batch_size: int) -> ShardRecord:
    """Read a record from a manifest, whose content may be arbitrary.

    Raises:
        ValueError, TypeError: The content is not a record.
    """
    record = ShardRecord(**content | {"nfe": tuple(content["nfe"])})
    numbers = (record.first, record.rows, *record.nfe)
    if not isinstance(record.sha256, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{reprlib.repr(content)} is not a shard's record")
    if not record.rows or record.rows != len(record.nfe) * batch_size:
        raise ValueError(f"{reprlib.repr(content)} is not the record of whole batches of {batch_size}")
    return record


def _tensor_column(values: Tensor) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values.numpy()))


def _to_parquet(spec: PairSpec, indices: range, pairs: PairSet) -> pa.Buffer:
    metadata: dict[str, Any] = {
        "bespoke.spec": spec.digest,
        "bespoke.device_class": spec.device_class,
        "bespoke.torch": torch.__version__,
        "bespoke.numpy": np.__version__,
    }
    columns = {
        "index": pa.array(np.asarray(indices, dtype=np.int64)),
        "condition": pa.array(pairs.stored.numpy()) if pairs.stored.ndim == 1 else _tensor_column(pairs.stored),
        "nfe": pa.array(pairs.nfe.numpy()),
        "x0": _tensor_column(pairs.x0),
        "x1": _tensor_column(pairs.x1),
    }
    if pairs.path is not None:
        columns |= _path_columns(pairs.path)
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    # Noise does not compress, and it has neither repeated values nor useful minima and maxima.
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=ROW_GROUP,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _check_layout(file: pq.ParquetFile, spec: PairSpec, rows: int) -> None:
    """Check rows, columns and types as declared in the footer, before any value is read.

    The footer's entries for column chunks are not checked: pyarrow aborts the process if these are nonsense.

    Raises:
        ValueError: The file does not have the layout of a shard of this spec.
    """
    schema = file.schema_arrow
    if file.metadata.num_rows != rows:
        raise ValueError(f"{file.metadata.num_rows:,} rows instead of {rows:,}")
    columns = ["index", "condition", "nfe", "x0", "x1", *(PATH_COLUMNS if spec.trajectory else ())]
    if schema.names != columns:
        raise ValueError(f"its columns are {', '.join(schema.names)[:200]}, not {', '.join(columns)}")
    sample = pa.fixed_shape_tensor(pa.float32(), spec.shape)
    for name, kind in {"index": pa.int64(), "nfe": pa.int32(), "x0": sample, "x1": sample}.items():
        if schema.field(name).type != kind:
            raise ValueError(f"column {name!r} is {schema.field(name).type}, not {kind}")
    condition = schema.field("condition").type
    value = condition.value_type if isinstance(condition, pa.FixedShapeTensorType) else condition
    if value not in (pa.int64(), pa.float32()):
        raise ValueError(f"column 'condition' is {condition}, not int64 or float32")
    for name in columns[5:]:
        if not pa.types.is_large_list(schema.field(name).type) or not pa.types.is_floating(
            schema.field(name).type.value_type
        ):
            raise ValueError(f"column {name!r} is {schema.field(name).type}, not large lists of numbers")


def _path_columns(path: DensePath) -> dict[str, pa.Array]:
    """The trajectories as one list per row, without padding."""
    count, knots = path.times.shape
    # Knots are strictly increasing, so a repeated last knot is padding.
    lengths = torch.cat([torch.ones(count, 1, dtype=torch.int64), (path.times.diff(dim=1) > 0).long()], dim=1).sum(1)
    kept = torch.arange(knots) < lengths[:, None]

    def lists(values: Tensor, width: int) -> pa.Array:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths * width).cumsum(0)])
        return pa.LargeListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values[kept].reshape(-1).numpy()))

    return {
        "path_times": lists(path.times, 1),
        "path_states": lists(path.states, path.states[0, 0].numel()),
        "path_velocities": lists(path.velocities, path.velocities[0, 0].numel()),
    }


def _from_table(table: pa.Table, spec: PairSpec) -> PairSet:
    def column(name: str) -> Tensor:
        array = _whole_column(table, name)
        values = array.to_numpy_ndarray() if isinstance(array, pa.FixedShapeTensorArray) else array.to_numpy()
        return torch.from_numpy(values.copy())

    pairs = PairSet(column("x0"), column("x1"), column("condition"), column("nfe"))
    return dataclasses.replace(pairs, path=_path_from(table, spec)) if spec.trajectory else pairs


def _path_from(table: pa.Table, spec: PairSpec) -> DensePath:
    """The trajectories of all rows, padded to the longest by repeating the last knot.

    Raises:
        ValueError: The lengths of the lists are inconsistent.
    """
    times, states, velocities = (_whole_column(table, name) for name in PATH_COLUMNS)
    lengths = np.diff(times.offsets.to_numpy())
    width = math.prod(spec.shape)
    if lengths.min(initial=1) < 1 or any(
        not np.array_equal(np.diff(lists.offsets.to_numpy()), lengths * width) for lists in (states, velocities)
    ):
        raise ValueError("the trajectory columns differ in length")
    if len(lengths) * int(lengths.max(initial=1)) > MAX_PADDING * max(1, int(lengths.sum())):
        raise ValueError(f"its trajectories have from {lengths.min()} to {lengths.max()} knots, which is implausible")
    starts = times.offsets.to_numpy()[:-1, None]
    knots = starts + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)

    def padded(lists: pa.LargeListArray, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(lists.values.to_numpy().reshape(-1, *shape)[knots])

    return DensePath(padded(times, ()), padded(states, spec.shape), padded(velocities, spec.shape))


def _whole_column(table: pa.Table, name: str) -> Any:
    array = table.column(name).combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
