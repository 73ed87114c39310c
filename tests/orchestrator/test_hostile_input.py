"""Files from untrusted sources: whatever they contain, reading them gives sound data or an error that names the file.

The fuzz tests use hypothesis; BESPOKE_FUZZ_EXAMPLES sets the number of examples per test (docs/reliability.md has the
count of a long run). Most tests also check the process's memory: a small file must not make it grow.

"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pair_spec_example import pair_spec

from orchestrator import lock
from orchestrator.errors import BusyStoreError, DamagedManifestError, DamagedShardError, StoreError
from orchestrator.export.safetensors import Safetensors
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.storage import Storage, canonical_json, digest_of
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.ns import InvalidThetaError
from solvers.schedulers import CondOT
from solvers.theta import MAX_BYTES, ThetaArtifact, load_theta
from solvers.theta_content import METADATA_KEY

EXAMPLES = int(os.environ.get("BESPOKE_FUZZ_EXAMPLES", "60"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

LARGE_ALLOCATION = 2**28
"""Bytes by which reading a hostile file may raise the peak memory of the process. Only the sparse files are larger."""

MESSAGE = 2_000
"""Maximum length of an error message, paths included: messages quote hostile values, but not in full."""

THETA = ThetaArtifact(GridSolver(Midpoint(), 4, Grid()).to_ns(CondOT()), family="midpoint", packages={"torch": "2"})

SPEC = pair_spec(shape=(1, 4, 4), count=12, batch_size=4, shard_size=8)

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-10, 10),
    st.sampled_from([10**15, 2**63, -(2**63), 10**400, -1, 0, 1e308, 5e-324, True, False]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(numbers, st.none(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


@contextmanager
def no_large_allocation() -> Iterator[None]:
    """Check that the peak memory of the process does not grow by more than LARGE_ALLOCATION."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < LARGE_ALLOCATION, f"{grown / 1e6:.0f} MB"


def _answer(action: Callable[[], Any], *refusals: type[Exception]) -> tuple[Any, Exception | None]:
    """Return the result of an action and None, or None and the error if it is one of ``refusals``; others propagate."""
    try:
        return action(), None
    except refusals as error:
        return None, error


def _refused_or_sound(load: Callable[[Path], ThetaArtifact], data: bytes, suffix: str) -> Exception | None:
    """Load these bytes as a theta: either an error that names the file, or a solver of finite numbers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"theta{suffix}"
        path.write_bytes(data)
        with no_large_allocation():
            artifact, error = _answer(lambda: load(path), InvalidThetaError)
        if error is not None:
            assert str(error).startswith(f"{path} is not a usable theta artifact: ")
            assert len(str(error)) < MESSAGE
            return error
        flat = artifact.solver.flat()
        assert bool(torch.isfinite(flat).all())
        assert float(flat.abs().max()) <= 1e6
        assert json.loads(artifact.to_json())["nfe"] == artifact.solver.nfe
        return None


# ---- theta as JSON ------------------------------------------------------------------------------------------------

CONTENT: dict[str, Any] = json.loads(THETA.to_json())


@fuzzed
@given(key=st.sampled_from(sorted(CONTENT)), value=values)
@example(key="nfe", value=10**12)
@example(key="nfe", value=-1)
@example(key="times", value=[float("nan")] * 4)
@example(key="a", value=[float("inf")] * 5)
@example(key="b", value=[[]] * 5)
@example(key="version", value=10**400)
@example(key="family", value="\ud800")
@example(key="packages", value={"x": {"y": []}})
def test_a_theta_with_one_field_replaced_is_refused_or_sound(key: str, value: Any) -> None:
    """NaN, infinities, huge and negative sizes, other types: every field is validated before it is used."""
    _refused_or_sound(load_theta, json.dumps({**CONTENT, key: value}).encode(), ".json")


@fuzzed
@given(
    key=st.sampled_from(["times", "a"]),
    position=st.integers(0, 3),
    value=st.one_of(numbers, st.text(max_size=3), st.lists(st.none(), max_size=2)),
)
def test_a_theta_with_one_number_replaced_is_refused_or_sound(key: str, position: int, value: Any) -> None:
    """A hostile number in the middle of a list is handled like a hostile field."""
    listed = list(CONTENT[key])
    listed[position] = value
    _refused_or_sound(load_theta, json.dumps({**CONTENT, key: listed}).encode(), ".json")


@fuzzed
@given(data=st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode())))
@example(data=b"")
@example(data=pickle.dumps({"times": [0.0]}))
def test_arbitrary_bytes_are_refused_as_a_theta(data: bytes) -> None:
    """Other JSON, other encodings, files of other programs."""
    assert _refused_or_sound(load_theta, data, ".json") is not None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"format":' * 100_000,
        json.dumps({**CONTENT, "packages": {"x": 0}}).replace("0}", "[" * 900 + "]" * 900 + "}"),
        json.dumps({**CONTENT, "nfe": 1}).replace('"nfe": 1', '"nfe": ' + "9" * 5000),
        json.dumps({**CONTENT, "sigma0": "x" * 1_000_000}),
    ],
    ids=["brackets", "braces", "deep value", "long integer", "long text"],
)
def test_deep_or_long_json_is_refused(text: str) -> None:
    """The limits of the JSON parser raise the same error."""
    assert _refused_or_sound(load_theta, text.encode(), ".json") is not None


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, suffix: str) -> None:
    """A sparse file of 10 GiB with the name of a theta."""
    path = tmp_path / f"theta{suffix}"
    path.touch()
    os.truncate(path, 10 * 2**30)
    with no_large_allocation(), pytest.raises(InvalidThetaError, match=rf"{path} is not a usable .* bytes"):
        load_theta(path)


def test_the_largest_theta_is_within_the_size_limit(tmp_path: Path) -> None:
    """With every number at full length, the limit refuses no file that this package can write."""
    per_number = len(json.dumps(-1.2345678901234567e-300)) + len(", ")
    assert per_number <= 28
    assert per_number * (1000 * 1005 // 2 + 1) < MAX_BYTES


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_path_that_is_not_a_file_is_refused_as_a_theta(tmp_path: Path, suffix: str) -> None:
    """A folder, and a name too long for a file."""
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FileNotFoundError, match="no theta artifact at"):
        load_theta(tmp_path / f"folder{suffix}")
    with pytest.raises(InvalidThetaError, match="it cannot be read"):
        load_theta(tmp_path / ("x" * 300 + suffix))


# ---- theta as safetensors -----------------------------------------------------------------------------------------


def _safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (path,) = Safetensors().export(THETA, Path(folder) / "theta.safetensors")
        return path.read_bytes()


WHOLE = _safetensors()


def _with_header(header: bytes, length: int | None = None, tail: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + tail


class _Bomb:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BESPOKE_TRACE"],)


def test_a_pickle_is_refused_and_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.save and bare, under either suffix: no code from the file is executed."""
    monkeypatch.setenv("BESPOKE_TRACE", str(tmp_path / "run"))
    torch.save({"times": _Bomb()}, tmp_path / "zip.pt")
    for data in (pickle.dumps(_Bomb()), (tmp_path / "zip.pt").read_bytes()):
        for suffix in (".json", ".safetensors"):
            assert _refused_or_sound(load_theta, data, suffix) is not None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [10 * 10**9, 2**64 - 1, 2**63, 99 * 10**6, 0])
def test_a_header_that_claims_gigabytes_is_refused(length: int) -> None:
    """The length in the file is checked against the size of the file."""
    assert _refused_or_sound(load_theta, _with_header(b"{}", length), ".safetensors") is not None


@pytest.mark.parametrize("size", [10**10, 2**62, -1])
def test_tensors_that_claim_gigabytes_are_refused(size: int) -> None:
    """A shape larger than the data in the file, with matching provenance."""
    provenance = {key: value for key, value in CONTENT.items() if key not in ("times", "a", "b")}
    header = {
        "__metadata__": {METADATA_KEY: json.dumps({**provenance, "nfe": 1000})},
        "times": {"dtype": "F64", "shape": [size], "data_offsets": [0, max(0, 8 * size)]},
    }
    assert _refused_or_sound(load_theta, _with_header(json.dumps(header).encode()), ".safetensors") is not None


@fuzzed
@given(metadata=values, tensors=values, deep=st.sampled_from([0, 200, 100_000]))
def test_arbitrary_headers_are_refused(metadata: Any, tensors: Any, deep: int) -> None:
    """Arbitrary JSON as the header and in its metadata."""
    provenance = {METADATA_KEY: "[" * deep + "]" * deep if deep else json.dumps(metadata)}
    for header in ({"__metadata__": provenance, "times": tensors}, {"__metadata__": metadata}, tensors):
        data = _with_header(json.dumps(header).encode("utf-8", "surrogatepass"))
        assert _refused_or_sound(load_theta, data, ".safetensors") is not None


@fuzzed
@given(
    position=st.integers(0, len(WHOLE) - 1),
    byte=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(0, len(WHOLE))),
)
def test_a_damaged_safetensors_file_is_refused_or_sound(position: int, byte: int, cut: int | None) -> None:
    """One byte changed, or the end missing."""
    data = bytearray(WHOLE)
    data[position] = byte
    _refused_or_sound(load_theta, bytes(data[:cut]), ".safetensors")


# ---- manifests ----------------------------------------------------------------------------------------------------


def _pairs(spec: PairSpec, shard: int) -> PairSet:
    rows = len(spec.shard_indices(shard))
    x0 = torch.arange(rows * 16, dtype=torch.float32).reshape(rows, *spec.shape) + shard
    return PairSet(x0, 2 * x0, torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 7).int())


@contextmanager
def _store() -> Iterator[PairStore]:
    """A complete store of two small shards."""
    with tempfile.TemporaryDirectory() as folder:
        store = PairStore(Storage.at(folder), SPEC)
        store.commit([store.write_shard(shard * SPEC.shard_size, _pairs(SPEC, shard)) for shard in range(2)])
        yield store


def _refused_store(storage: Storage, digest: str) -> None:
    """Check that loading the store fails with an error that names the manifest or the shard."""
    with no_large_allocation(), pytest.raises((DamagedManifestError, DamagedShardError)) as caught:
        PairStore.open(storage, f"{digest}-{SPEC.count}").load()
    assert storage.location(f"pairs/{digest}/") in str(caught.value)
    assert len(str(caught.value)) < MESSAGE


with _store() as _example:
    MANIFEST: dict[str, Any] = _example.storage.read_json(_example.manifest_key)


@fuzzed
@given(
    data=st.one_of(
        st.binary(max_size=100),
        values.map(lambda value: json.dumps(value).encode()),
        values.map(lambda value: json.dumps({**MANIFEST, "spec": value}).encode()),
        values.map(lambda value: json.dumps({**MANIFEST, "shards": value}).encode()),
        values.map(lambda value: json.dumps({**MANIFEST, "shards": [MANIFEST["shards"][0], value]}).encode()),
    )
)
@example(data=b"[" * 1_000_000)
@example(data=b"\xff\xfe")
def test_an_invalid_manifest_is_refused(data: bytes) -> None:
    """Not JSON, other JSON, or fields of other types."""
    with _store() as store:
        store.storage.write(store.manifest_key, data)
        _refused_store(store.storage, SPEC.digest)


@fuzzed
@given(key=st.sampled_from(sorted(MANIFEST["spec"])), value=values)
@example(key="batch_size", value=10**15)
@example(key="batch_size", value=10**400)
@example(key="shard_size", value=0)
@example(key="shape", value=[2**40])
@example(key="shape", value=[-4, -4])
@example(key="conditioning", value=[])
@example(key="trajectory", value=True)
def test_a_false_spec_in_the_folder_of_its_own_digest_is_refused(key: str, value: Any) -> None:
    """Anyone can make the digest match: the spec itself must be valid, and the shards must be the ones it describes."""
    spec = {**MANIFEST["spec"], key: value}
    if spec == MANIFEST["spec"]:
        return
    try:
        version = spec["format"] if type(spec["format"]) is int else SPEC.format
        digest = f"v{version}-{digest_of({name: kept for name, kept in spec.items() if name != 'conditioning'})}"
    except ValueError:
        return  # NaN has no digest, so it has no folder
    with _store() as store:
        text = json.dumps({**MANIFEST, "spec": spec}).encode()
        store.storage.write(f"pairs/{digest}/manifest.json", text)
        for shard in range(2):
            store.storage.write(
                f"pairs/{digest}/shard-{shard:05d}.parquet",
                store.storage.read(store.shard_key(SPEC.shard_indices(shard))),
            )
        _refused_store(store.storage, digest)


@fuzzed
@given(key=st.sampled_from(sorted(MANIFEST["shards"][0])), value=values)
def test_a_false_shard_record_is_refused_or_changes_no_pair(key: str, value: Any) -> None:
    """A wrong sha256 or shard number is detected. Counts are informative only, but must be counts."""
    with _store() as store:
        changed = [{**MANIFEST["shards"][0], key: value}, MANIFEST["shards"][1]]
        store.storage.write(store.manifest_key, json.dumps({**MANIFEST, "shards": changed}).encode())
        loaded, error = _answer(
            lambda: PairStore.open(store.storage, SPEC.name).load(), DamagedManifestError, DamagedShardError
        )
        if error is not None:
            assert store.storage.location(store.folder) in str(error)
            return
        assert torch.equal(loaded.x0, torch.cat([_pairs(SPEC, shard).x0 for shard in range(2)]))
        assert all(type(number) is int for record in store.records() for number in (record.rows, *record.nfe))


def test_a_manifest_of_gigabytes_is_not_read() -> None:
    """A sparse file of 10 GiB."""
    with _store() as store:
        os.truncate(store.storage.path(store.manifest_key), 10 * 2**30)
        with no_large_allocation(), pytest.raises(StoreError, match=r"manifest\.json has 10,737,418,240 bytes"):
            store.load()


# ---- shards -------------------------------------------------------------------------------------------------------


def _refused_shard(store: PairStore, data: bytes) -> None:
    """Check that these bytes are refused as a shard, with a manifest that has their sha256 and without a manifest."""
    store.storage.write(store.shard_key(SPEC.shard_indices(0)), data)
    records = [dataclasses.replace(r, sha256=hashlib.sha256(data).hexdigest()) if r.first == 0 else r for r in RECORDS]
    store.commit(records)
    with no_large_allocation(), pytest.raises(DamagedShardError) as caught:
        store.load()
    assert store.storage.location(store.shard_key(SPEC.shard_indices(0))) in str(caught.value)
    assert "run `bespoke pairs` on the same configuration" in str(caught.value)
    assert len(str(caught.value)) < MESSAGE
    store.storage.delete(store.manifest_key)
    assert store.inspect_shard(SPEC.shard_indices(0)) is None


with _store() as _example:
    RECORDS = _example.records()
    SHARD = _example.storage.read(_example.shard_key(SPEC.shard_indices(0)))
TABLE = pq.read_table(pa.BufferReader(SHARD))

arrays = st.one_of(
    st.lists(st.integers(-(2**31), 2**31), min_size=8, max_size=8).map(pa.array),
    st.lists(st.floats(), min_size=8, max_size=8).map(pa.array),
    st.lists(st.text(max_size=4), min_size=8, max_size=8).map(pa.array),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=8, max_size=8).map(lambda v: pa.array(v, pa.bool_())),
    st.lists(st.lists(st.floats(width=32), max_size=20), min_size=8, max_size=8).map(
        lambda v: pa.array(v, pa.large_list(pa.float32()))
    ),
    st.sampled_from([(16,), (4, 4), (1, 4, 5), (4, 1, 4), (2, 1, 4, 4)]).map(
        lambda shape: pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((8, *shape), np.float32))
    ),
    st.sampled_from([np.float64, np.float16, np.int64, np.uint8]).map(
        lambda kind: pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((8, 1, 4, 4), kind))
    ),
)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@fuzzed
@given(name=st.sampled_from(TABLE.column_names), array=arrays)
def test_a_shard_with_another_column_is_refused(name: str, array: pa.Array) -> None:
    """Wrong dtypes, shapes or nesting under the name of an existing column."""
    table = TABLE.set_column(TABLE.column_names.index(name), name, array)
    if table.schema.equals(TABLE.schema):  # other labels or evaluation counts are valid Parquet
        return
    with _store() as store:
        _refused_shard(store, _parquet(table.replace_schema_metadata(TABLE.schema.metadata)))


@fuzzed
@given(
    change=st.one_of(
        st.permutations(TABLE.column_names).filter(lambda names: names != TABLE.column_names).map(TABLE.select),
        st.sets(st.sampled_from(TABLE.column_names), min_size=1).map(lambda names: TABLE.drop_columns(list(names))),
        st.integers(0, 7).map(TABLE.slice).filter(lambda table: len(table) < 8),
        st.integers(1, 5).map(lambda times: pa.concat_tables([TABLE] * (times + 1))),
        st.text(max_size=20).map(lambda name: TABLE.append_column(name, pa.array(range(8)))),
        st.binary(max_size=16).map(lambda digest: TABLE.replace_schema_metadata({b"bespoke.spec": digest})),
    )
)
def test_a_shard_with_other_rows_or_columns_is_refused(change: pa.Table) -> None:
    """Missing, additional, in another order, or of another spec."""
    with _store() as store:
        _refused_shard(store, _parquet(change))


@fuzzed
@given(
    position=st.integers(0, len(SHARD) - 1),
    byte=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(0, len(SHARD))),
)
def test_a_damaged_shard_counts_as_missing(position: int, byte: int, cut: int | None) -> None:
    """A changed byte or a missing end is detected without a manifest and without crashing the Parquet reader."""
    data = bytearray(SHARD)
    data[position] = byte
    changed = bytes(data[:cut])
    if changed == SHARD:
        return
    with _store() as store:
        store.storage.delete(store.manifest_key)
        store.storage.write(store.shard_key(SPEC.shard_indices(0)), changed)
        assert store.inspect_shard(SPEC.shard_indices(0)) is None


def test_files_of_other_formats_are_refused_as_a_shard() -> None:
    """A pickle, an empty file and Parquet magic bytes without content."""
    with _store() as store:
        for data in (pickle.dumps([1]), b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1"):
            _refused_shard(store, data)


# ---- names --------------------------------------------------------------------------------------------------------

NAMES = ["..", ".", "", "a", "folder", "file", "link", "within", "...", "é", "~", "x" * 300]
ESCAPES = ["%2e%2e", "..%2f..", "..\\..", "\0", "\ud800"]
parts = st.sampled_from([*NAMES, *ESCAPES])


@fuzzed
@given(key=st.lists(parts, max_size=6).map("/".join))
@example(key="link/escaped")
@example(key="folder/link/../../escaped")
@example(key="/etc/passwd")
@example(key="%2e%2e/escaped")
@example(key="link")
@example(key="")
def test_no_key_leads_out_of_the_root(key: str) -> None:
    """With .., absolute, through a link or URL-encoded: an error that quotes the key, or an object inside the root."""
    with tempfile.TemporaryDirectory() as folder:
        outside, root = Path(folder) / "outside", Path(folder) / "root"
        (root / "folder").mkdir(parents=True)
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        (root / "file").write_bytes(b"here")
        (root / "link").symlink_to(outside)
        (root / "folder/link").symlink_to("../../outside/secret")
        (root / "within").symlink_to("folder")
        storage = Storage.at(root)
        for action in (
            lambda: storage.write(key, b"data"),
            lambda: storage.read(key),
            lambda: storage.exists(key),
            lambda: storage.delete(key),
            lambda: storage.names(key),
        ):
            result, error = _answer(action, StoreError, FileNotFoundError)
            assert result not in (b"secret", ["secret"])
            assert len(str(error)) < MESSAGE + 4 * len(key)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["outside", "root"]
        assert [path.name for path in outside.iterdir()] == ["secret"]
        assert (outside / "secret").read_bytes() == b"secret"


def test_the_error_for_a_link_out_of_the_root_names_its_target_and_the_remedy(tmp_path: Path) -> None:
    """A user may have moved a folder to another disk: the message says where it is and what to do."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/pairs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        StoreError,
        match=rf"'pairs/x' leads through a link to {tmp_path}/elsewhere/x, out of the storage root {tmp_path}/root; "
        r"give --storage the place that the link points to",
    ):
        Storage.at(tmp_path / "root").write("pairs/x", b"data")


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    """The user chooses the root."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    storage = Storage.at(tmp_path / "root")
    storage.write("folder/object", b"data")
    assert (tmp_path / "elsewhere/folder/object").read_bytes() == b"data"


@fuzzed
@given(digest=st.lists(parts, max_size=4).map("/".join))
def test_no_digest_opens_a_store_elsewhere(digest: str) -> None:
    """A digest comes from files and command lines, and is checked like any other name."""
    with _store() as store, pytest.raises(StoreError):
        PairStore.open(store.storage, f"{digest}/../x")


# ---- locks --------------------------------------------------------------------------------------------------------


@fuzzed
@given(data=st.one_of(st.binary(max_size=50), values.map(lambda value: _lock_content(value))))
@example(data=b"[" * 1_000_000)
@example(data=b'{"until": "tomorrow"}')
@example(data=b'{"until": 1e400, "user": []}')
def test_a_lock_file_of_any_content_is_read(data: bytes) -> None:
    """Its content affects only the owner named in the message and how long a lease is waited for."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.at(folder)
        storage.write("store/.lock", data)
        with lock.exclusive(storage, "store/.lock", wait=False, announce=lambda sentence: None):
            storage.write("other/.lock", data)
            assert isinstance(lock._current(storage, "other/.lock"), dict)
        sentence = lock._busy("store", lock._parse(data))
        assert len(sentence) < MESSAGE


def _lock_content(value: Any) -> bytes:
    try:
        return canonical_json({"user": value, "until": value}).encode()
    except ValueError:
        return json.dumps({"user": value, "until": value}).encode()


def test_a_lease_without_a_valid_expiry_is_taken_over(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable lease belongs to no one. A lease that has not expired is respected, whatever wrote it."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    for content in (b"\xff", b"[1]", b'{"until": "for ever"}', b'{"until": null}', b'{"until": NaN}'):
        object_store.write("store/.lock", content)
        with lock.exclusive(object_store, "store/.lock", wait=False, announce=lambda sentence: None):
            pass
    object_store.write("store/.lock", b'{"until": 1e18}')
    with (
        pytest.raises(BusyStoreError, match=r"in use by \? on \? \(process \?\) since \?"),
        lock.exclusive(object_store, "store/.lock", wait=False, announce=lambda sentence: None),
    ):
        pytest.fail("a lease was taken over")
