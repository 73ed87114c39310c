"""The pair store: one Parquet file per shard, and a manifest that is written last. Independent of models.

A store is a folder ``pairs/<digest of the spec>/``. Shards are written atomically. The store is complete if and only if
its manifest (sha256, rows and NFE of every shard) exists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from orchestrator.errors import DamagedManifestError, DamagedShardError, StoreError
from orchestrator.pairs.pair_set import PairSet, concatenate
from orchestrator.pairs.spec import PairSpec
from orchestrator.storage import Storage
from solvers.trajectory import DensePath

ROW_GROUP = 256
PATH_COLUMNS = ("path_times", "path_states", "path_velocities")

MAX_PADDING = 64
"""Limit on how much padding to the longest trajectory may enlarge a shard, as a factor."""

REMEDY = "run `bespoke pairs` on the same configuration: damaged shards are remade, the others are kept"


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's record of a shard.

    Attributes:
        shard: Number of the shard.
        sha256: sha256 of the file.
        rows: Number of pairs.
        nfe_min, nfe_max, nfe_sum: Velocity evaluations per pair (those of its batch), over the pairs of the shard.
    """

    shard: int
    sha256: str
    rows: int
    nfe_min: int
    nfe_max: int
    nfe_sum: int


class PairStore:
    """The shards of one spec under a storage root."""

    def __init__(self, storage: Storage, spec: PairSpec):
        self.storage = storage
        self.spec = spec
        self.folder = f"pairs/{spec.digest}"
        self.manifest_key = f"{self.folder}/manifest.json"

    def shard_key(self, shard: int) -> str:
        return f"{self.folder}/shard-{shard:05d}.parquet"

    @classmethod
    def open(cls, storage: Storage, digest: str) -> PairStore:
        """Open the complete store with this digest.

        Raises:
            StoreError: The store does not exist or is not complete.
            DamagedManifestError: The manifest is damaged.
        """
        key = f"pairs/{digest}/manifest.json"
        if not storage.exists(key):
            raise StoreError(f"no complete pair store {digest} under {storage.shown}; make it with `bespoke pairs`")
        spec, _ = _read_manifest(storage, digest)
        return cls(storage, spec)

    def is_complete(self) -> bool:
        return self.storage.exists(self.manifest_key)

    def records(self) -> list[ShardRecord]:
        """The records of the manifest, in order of shard.

        Raises:
            StoreError: The manifest does not exist.
            DamagedManifestError: The manifest is damaged.
        """
        if not self.is_complete():
            raise StoreError(f"pair store {self.storage.location(self.folder)} is not complete; {REMEDY}")
        _, records = _read_manifest(self.storage, self.spec.digest)
        return records

    def write_shard(self, shard: int, pairs: PairSet) -> ShardRecord:
        """Write one shard atomically.

        The bytes depend only on the spec and the values, not on the time or the host.

        Raises:
            StoreError: The storage is full; nothing is left behind.
        """
        data = _to_parquet(self.spec, shard, pairs)
        self.storage.write(self.shard_key(shard), data)
        return _record(shard, data, pairs.nfe.numpy())

    def inspect_shard(self, shard: int) -> ShardRecord | None:
        """The record of an intact shard; None if the shard is missing or damaged."""
        if not self.storage.exists(self.shard_key(shard)):
            return None
        data = self.storage.read(self.shard_key(shard))
        try:
            pairs = self._parse(shard, data)
        except DamagedShardError:
            return None
        # Page checksums do not cover the headers and the footer. The spec and the values determine all bytes, however.
        if not _to_parquet(self.spec, shard, pairs).equals(pa.py_buffer(data)):
            return None
        return _record(shard, data, pairs.nfe.numpy())

    def commit(self, records: Sequence[ShardRecord]) -> None:
        """Write the manifest, which makes the store complete.

        Raises:
            StoreError: There is not exactly one record per shard.
        """
        ordered = sorted(records, key=lambda record: record.shard)
        if [record.shard for record in ordered] != list(range(self.spec.shards)):
            raise StoreError(
                f"{len(ordered)} of {self.spec.shards} shards are made; the manifest is written once all of them are"
            )
        self.storage.write_json(
            self.manifest_key,
            {"spec": dataclasses.asdict(self.spec), "shards": [dataclasses.asdict(record) for record in ordered]},
        )

    def damaged(self) -> list[int]:
        """Shards of a complete store that are missing or whose sha256 differs from the manifest's."""
        return [record.shard for record in self.records() if not self._is_whole(record)]

    def _is_whole(self, record: ShardRecord) -> bool:
        key = self.shard_key(record.shard)
        return self.storage.exists(key) and hashlib.sha256(self.storage.read(key)).hexdigest() == record.sha256

    def load(self) -> PairSet:
        """Load all pairs, in order of index.

        Raises:
            StoreError: The store is not complete.
            DamagedShardError: A shard is missing or does not match the manifest.
        """
        parts: list[PairSet] = []
        for record in self.records():
            part = self._checked(record)
            first = parts[0].condition if parts else part.condition
            if (part.condition.shape[1:], part.condition.dtype) != (first.shape[1:], first.dtype):
                raise DamagedShardError(
                    f"conditions in shard {self.storage.location(self.shard_key(record.shard))} differ in shape or "
                    f"type from those in {self.storage.location(self.shard_key(0))}: one of them is damaged; {REMEDY}"
                )
            parts.append(part)
        return concatenate(parts)

    def load_shard(self, shard: int) -> PairSet:
        """Load the pairs of one shard of a complete store, in order of index.

        Raises:
            StoreError: See :meth:`load`.
        """
        return self._checked(self.records()[shard])

    def _checked(self, record: ShardRecord) -> PairSet:
        key = self.shard_key(record.shard)
        if not self.storage.exists(key):
            raise DamagedShardError(f"shard {self.storage.location(key)} is missing; {REMEDY}")
        data = self.storage.read(key)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamagedShardError(
                f"shard {self.storage.location(key)} is damaged: {len(data):,} bytes with a sha256 that is not the "
                f"manifest's; {REMEDY}"
            )
        return self._parse(record.shard, data)

    def _parse(self, shard: int, data: bytes) -> PairSet:
        """Parse the bytes of a shard and check them against the spec.

        Raises:
            DamagedShardError: The bytes are not Parquet, a page checksum is wrong, or the rows are not this shard's.
        """
        where = self.storage.location(self.shard_key(shard))
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            _check_layout(file, self.spec, len(self.spec.shard_indices(shard)))
            table = file.read()
            footer = table.schema.metadata or {}
            pairs = _from_table(table, self.spec)
            index = table.column("index").combine_chunks().to_numpy()
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise DamagedShardError(f"shard {where} is damaged: {error}; {REMEDY}") from error
        if footer.get(b"bespoke.spec") != self.spec.digest.encode():
            raise DamagedShardError(f"shard {where} belongs to another spec; {REMEDY}")
        expected = np.arange(len(self.spec.shard_indices(shard))) + self.spec.shard_indices(shard).start
        if pairs.x0.shape[1:] != self.spec.shape or not np.array_equal(index, expected):
            raise DamagedShardError(f"shard {where} does not hold the rows of shard {shard}; {REMEDY}")
        return pairs


def _read_manifest(storage: Storage, digest: str) -> tuple[PairSpec, list[ShardRecord]]:
    key = f"pairs/{digest}/manifest.json"
    try:
        content = storage.read_json(key)
        spec, records = PairSpec.from_dict(content["spec"]), [_as_record(record) for record in content["shards"]]
        # The number of records is compared first, since a damaged spec may claim an enormous number of shards.
        fits = spec.digest == digest and len(records) == spec.shards
        fits = fits and [record.shard for record in records] == list(range(spec.shards))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedManifestError(f"manifest {storage.location(key)} is damaged: {error}; {REMEDY}") from error
    if not fits:
        raise DamagedManifestError(f"manifest {storage.location(key)} does not belong to its folder; {REMEDY}")
    return spec, records


def _as_record(content: dict[str, Any]) -> ShardRecord:
    """Read a record from a manifest, whose content may be arbitrary.

    Raises:
        ValueError, TypeError: The content is not a record.
    """
    record = ShardRecord(**content)
    numbers = (record.shard, record.rows, record.nfe_min, record.nfe_max, record.nfe_sum)
    if not isinstance(record.sha256, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{reprlib.repr(content)} is not a shard's record")
    return record


def _record(shard: int, data: bytes | pa.Buffer, nfe: npt.NDArray[np.int32]) -> ShardRecord:
    return ShardRecord(
        shard=shard,
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(nfe),
        nfe_min=int(nfe.min()),
        nfe_max=int(nfe.max()),
        nfe_sum=int(nfe.sum()),
    )


def _tensor_column(values: Tensor) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values.numpy()))


def _to_parquet(spec: PairSpec, shard: int, pairs: PairSet) -> pa.Buffer:
    indices = spec.shard_indices(shard)
    metadata: dict[str, Any] = {
        "bespoke.spec": spec.digest,
        "bespoke.device_class": spec.device_class,
        "bespoke.torch": torch.__version__,
        "bespoke.numpy": np.__version__,
    }
    columns = {
        "index": pa.array(np.arange(indices.start, indices.stop)),
        "condition": pa.array(pairs.condition.numpy())
        if pairs.condition.ndim == 1
        else _tensor_column(pairs.condition),
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
