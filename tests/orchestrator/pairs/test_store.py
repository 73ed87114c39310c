"""The pair store: its bytes follow from the spec, its manifest is written last, and all damage is detected.

The tests run on a directory and on S3, which get the same bytes.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import DamagedManifestError, DamagedShardError, StoreError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.randomness import noise
from orchestrator.storage import Storage

REMEDY = r"run `bespoke pairs` on the same configuration: damaged shards are remade, the others are kept"
VALIDATION = PairKey("validation", 1.0, 0)
FIRST, SECOND = range(16), range(16, 32)


STORAGE_KINDS = ["directory", "s3"]


@pytest.fixture(params=STORAGE_KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of either kind."""
    return Storage.at(tmp_path / "storage") if request.param == "directory" else request.getfixturevalue("s3_storage")


@pytest.fixture(params=STORAGE_KINDS)
def copied(request: pytest.FixtureRequest) -> Storage:
    """A copy of the small experiment's pairs on a storage of either kind; tests may damage it."""
    name = "copied_in_directory" if request.param == "directory" else "copied_to_s3"
    return request.getfixturevalue(name)


@pytest.fixture
def copied_in_directory(made: Storage, specs: dict[PairKey, PairSpec], tmp_path: Path) -> Storage:
    return Storage.at(shutil.copytree(made.root, tmp_path / "copied"))


@pytest.fixture
def store(copied: Storage, specs: dict[PairKey, PairSpec]) -> PairStore:
    """A complete store of two shards; tests may damage it."""
    return PairStore(copied, specs[VALIDATION])


@pytest.fixture
def unfinished(store: PairStore) -> PairStore:
    """The same store before its manifest is written."""
    store.storage.delete(store.manifest_key)
    return store


def _pairs(spec: PairSpec, shard: int) -> PairSet:
    """Pairs with the right noise and an invented ground truth."""
    indices = spec.shard_indices(shard)
    x0 = torch.from_numpy(noise(spec.seed, indices, spec.shape))
    return PairSet(x0, 2 * x0, torch.zeros(len(indices), dtype=torch.int64), torch.full((len(indices),), 7).int())


def test_a_store_loads_all_pairs_in_order_of_index(store: PairStore, specs: dict[PairKey, PairSpec]) -> None:
    """They have the noise of their seed, finite ground truth and the conditions of their dataset."""
    spec = specs[VALIDATION]
    pairs = store.load()
    assert len(pairs) == spec.count == 32
    np.testing.assert_array_equal(pairs.x0.numpy(), noise(spec.seed, range(32), spec.shape))
    labels = plugins.build("datasets", spec.conditioning["name"], spec.conditioning["options"])
    np.testing.assert_array_equal(pairs.condition.numpy(), labels.conditions(spec.seed, range(32)))
    assert torch.isfinite(pairs.x1).all()
    assert (pairs.x1.dtype, pairs.nfe.dtype) == (torch.float32, torch.int32)


def test_the_manifest_counts_the_evaluations(store: PairStore) -> None:
    """The cost of ground truth can be read without the shards."""
    nfe_by_shard = store.load().nfe.reshape(2, 16)
    for record, nfe in zip(store.records(), nfe_by_shard, strict=True):
        assert record.rows == 16
        assert record.nfe == tuple(nfe[::8].tolist())
        assert record.nfe_sum == int(nfe.sum())
    assert store.evaluations() == int(nfe_by_shard.sum())
    fewer = PairStore(store.storage, dataclasses.replace(store.spec, count=19))
    assert fewer.evaluations() == int(fewer.load().nfe.sum())


def test_the_same_shard_written_twice_has_the_same_bytes(storage: Storage, specs: dict[PairKey, PairSpec]) -> None:
    """Shards contain neither time nor host name, and the order of writing does not matter: one spec, one sha256."""
    store = PairStore(storage, specs[VALIDATION])
    first = store.write_shard(16, _pairs(store.spec, 1))
    data = storage.read(store.shard_key(SECOND))
    store.write_shard(0, _pairs(store.spec, 0))
    again = store.write_shard(16, _pairs(store.spec, 1))
    assert again == first
    assert storage.read(store.shard_key(SECOND)) == data


def test_another_host_makes_the_same_bytes(
    store: PairStore,
    storage: Storage,
    specs: dict[PairKey, PairSpec],
    host_settings: Callable[..., HostSettings],
) -> None:
    """Pair i depends only on (spec, i), so a host that makes only the second shard writes the same bytes."""
    other = LocalPool(Host(host_settings(storage)))
    record = other.call(Request.of(HostProtocol.make_shard, spec=specs[VALIDATION], first=16, stop=32))
    assert record == store.records()[1]
    assert storage.read(store.shard_key(SECOND)) == store.storage.read(store.shard_key(SECOND))


def test_a_shard_records_the_spec_device_and_versions_that_made_it(store: PairStore) -> None:
    """A stray file can be traced back."""
    footer = pq.read_schema(pa.BufferReader(store.storage.read(store.shard_key(FIRST)))).metadata
    assert footer[b"bespoke.spec"].decode() == store.spec.digest
    assert footer[b"bespoke.device_class"] == b"cpu"
    assert footer[b"bespoke.torch"].decode() == torch.__version__
    assert footer[b"bespoke.numpy"].decode() == np.__version__


def test_a_store_is_complete_once_its_manifest_exists(storage: Storage, specs: dict[PairKey, PairSpec]) -> None:
    """Opening a store that has only shards is an error, which names the command that completes it."""
    store = PairStore(storage, specs[VALIDATION])
    records = [store.write_shard(shard * 16, _pairs(store.spec, shard)) for shard in range(2)]
    assert not store.is_complete()
    with pytest.raises(StoreError, match=f"pair store .*{store.spec.digest} is not complete; {REMEDY}"):
        store.load()
    with pytest.raises(StoreError, match=rf"no complete pair store {store.spec.digest} .*make it with `bespoke pairs`"):
        PairStore.open(storage, store.spec.name)
    store.commit(records)
    assert store.is_complete()
    assert PairStore.open(storage, store.spec.name).spec == store.spec
    assert PairStore.open(storage, store.spec.name).records() == records


@pytest.mark.parametrize("present", [[], [1]])
def test_a_manifest_is_written_only_for_all_shards(
    storage: Storage, specs: dict[PairKey, PairSpec], present: list[int]
) -> None:
    """A manifest with a gap would mark an incomplete store as complete."""
    store = PairStore(storage, specs[VALIDATION])
    records = [store.write_shard(shard * 16, _pairs(store.spec, shard)) for shard in present]
    with pytest.raises(
        StoreError, match=rf"{32 - 16 * len(present)} of 32 pairs are missing; the manifest is written last"
    ):
        store.commit(records)
    assert not store.is_complete()


def test_the_error_for_a_truncated_shard_has_its_name_and_the_remedy(store: PairStore) -> None:
    """Such a file is left by an interrupted copy."""
    key = store.shard_key(SECOND)
    data = store.storage.read(key)
    for length in (0, 3, len(data) // 2, len(data) - 1):
        store.storage.write(key, data[:length])
        with pytest.raises(
            DamagedShardError, match=rf"shard .*shard-00001\.parquet is damaged: {length:,} bytes .*; {REMEDY}"
        ):
            store.load()
        assert [store.is_whole(record) for record in store.records()] == [True, False]


def test_a_flipped_bit_anywhere_in_a_shard_is_detected(store: PairStore) -> None:
    """This holds for headers, values and footer."""
    key = store.shard_key(FIRST)
    data = store.storage.read(key)
    rng = random.Random(0)
    for _ in range(50):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        store.storage.write(key, bytes(damaged))
        with pytest.raises(DamagedShardError, match=rf"shard-00000\.parquet is damaged: .*; {REMEDY}"):
            store.load()
    store.storage.write(key, data)
    assert all(store.is_whole(record) for record in store.records())


def test_a_flipped_bit_is_detected_without_a_manifest(unfinished: PairStore) -> None:
    """Page checksums exclude headers and footer, but a resumed run must not accept such a shard."""
    key = unfinished.shard_key(FIRST)
    data = unfinished.storage.read(key)
    rng = random.Random(1)
    footer = len(data) - 2500
    positions = [rng.randrange(len(data)) for _ in range(150)] + [rng.randrange(footer, len(data)) for _ in range(150)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        unfinished.storage.write(key, bytes(damaged))
        assert unfinished.inspect_shard(FIRST) is None, f"a flip in byte {position} of {len(data)} was not detected"
    unfinished.storage.write(key, data)
    assert unfinished.inspect_shard(FIRST) is not None


def test_a_truncated_shard_is_detected_without_a_manifest(unfinished: PairStore) -> None:
    """The shard is remade, however many bytes are missing."""
    key = unfinished.shard_key(FIRST)
    data = unfinished.storage.read(key)
    for length in [0, 4, *random.Random(2).sample(range(len(data)), 30), len(data) - 1]:
        unfinished.storage.write(key, data[:length])
        assert unfinished.inspect_shard(FIRST) is None


def test_the_error_for_a_missing_shard_has_its_name_and_the_remedy(store: PairStore) -> None:
    """The file was deleted by hand."""
    store.storage.delete(store.shard_key(SECOND))
    with pytest.raises(DamagedShardError, match=rf"shard .*shard-00001\.parquet is missing; {REMEDY}"):
        store.load()
    assert [store.is_whole(record) for record in store.records()] == [True, False]
    assert store.inspect_shard(SECOND) is None


def test_a_shard_of_another_spec_is_not_accepted(store: PairStore, specs: dict[PairKey, PairSpec]) -> None:
    """It was copied in by hand, has the right name and is not damaged."""
    other = PairStore(store.storage, specs[PairKey("test", 1.0, 0)])
    store.storage.write(store.shard_key(FIRST), store.storage.read(other.shard_key(FIRST)))
    with pytest.raises(DamagedShardError, match=r"shard-00000\.parquet is damaged"):
        store.load()
    assert store.inspect_shard(FIRST) is None


def test_a_shard_under_a_wrong_number_is_not_accepted(unfinished: PairStore) -> None:
    """The rows of shard 1 are not those of shard 0."""
    unfinished.storage.write(unfinished.shard_key(FIRST), unfinished.storage.read(unfinished.shard_key(SECOND)))
    assert unfinished.inspect_shard(FIRST) is None
    assert unfinished.inspect_shard(SECOND) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"shards"', b'"shardz"'),
        lambda text: text.replace(b'"seed": 0', b'"seed": 33'),
        lambda text: text.replace(b'"first": 16', b'"first": 8'),
        lambda text: b"[]",
        lambda text: b"\xff" + text,
    ],
)
def test_the_error_for_a_damaged_manifest_has_its_name_and_the_remedy(
    store: PairStore, damage: Callable[[bytes], bytes]
) -> None:
    """A truncated or altered manifest leads neither to a traceback nor to other pairs."""
    store.storage.write(store.manifest_key, damage(store.storage.read(store.manifest_key)))
    with pytest.raises(DamagedManifestError, match=rf"manifest .*manifest\.json .*; {REMEDY}"):
        store.load()
    with pytest.raises(DamagedManifestError, match=rf"manifest .*manifest\.json .*; {REMEDY}"):
        PairStore.open(store.storage, store.spec.name)


def test_the_manifest_of_another_store_is_refused(store: PairStore, specs: dict[PairKey, PairSpec]) -> None:
    """It is undamaged but in the wrong folder."""
    other = PairStore(store.storage, specs[PairKey("test", 1.0, 0)])
    store.storage.write(store.manifest_key, store.storage.read(other.manifest_key))
    with pytest.raises(DamagedManifestError, match=r"manifest\.json does not belong to its folder"):
        PairStore.open(store.storage, store.spec.name)


def test_pairs_of_two_device_classes_are_never_mixed(
    storage: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> None:
    """An accelerator rounds differently, so its pairs are another set, of which this host refuses to make shards."""
    spec = dataclasses.replace(specs[VALIDATION], device_class="NVIDIA H200")
    assert PairStore(storage, spec).folder != PairStore(storage, specs[VALIDATION]).folder
    pool = LocalPool(Host(host_settings(storage)))
    with pytest.raises(
        StoreError,
        match=r"for device class 'NVIDIA H200', but this host is 'cpu'; shards of two classes are not mixed: choose",
    ):
        pool.call(Request.of(HostProtocol.make_shard, spec=spec, first=0, stop=16))


def test_a_host_refuses_to_make_pairs_of_another_model(
    storage: Storage, specs: dict[PairKey, PairSpec], host_settings: Callable[..., HostSettings]
) -> None:
    """A spec identifies its model by the digest of its weights."""
    pool = LocalPool(Host(host_settings(storage, "digits_fm_v_cs")))
    with pytest.raises(StoreError, match=r"pair spec \S+ is for a different model than digits_fm_v_cs"):
        pool.call(Request.of(HostProtocol.make_shard, spec=specs[VALIDATION], first=0, stop=16))


def test_conditions_of_any_shape_are_stored(storage: Storage, specs: dict[PairKey, PairSpec]) -> None:
    """A label is one number per pair, a prompt a row of numbers."""
    store = PairStore(storage, specs[VALIDATION])
    tokens = torch.arange(16 * 3).reshape(16, 3)
    records = []
    for shard in range(2):
        pairs = _pairs(store.spec, shard)
        records.append(store.write_shard(shard * 16, PairSet(pairs.x0, pairs.x1, tokens + shard, pairs.nfe)))
    store.commit(records)
    torch.testing.assert_close(store.load().condition, torch.cat([tokens, tokens + 1]))
    assert [store.inspect_shard(indices) for indices in (FIRST, SECOND)] == records
