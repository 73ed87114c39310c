"""Making pairs resumes after any interruption, remakes damaged files, and always ends with the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from orchestrator.config.pair_plan import PairKey
from orchestrator.cost import FILE, load_costs
from orchestrator.errors import PoolError, StoreError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import cost_item, ensure_pairs
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool, Outcome, Pool, Request
from orchestrator.storage import Storage

SPEC = PairKey("train", 1.0, 0)
SECOND = range(16, 32)


class CountingPool(Pool):
    """A pool that records the requested shards and can fail in two ways.

    Args:
        inner: The pool that answers.
        killed_after: Number of requests after which the run is interrupted; None: never.
        poison: Number of a shard whose request fails; None: none fails.
    """

    def __init__(self, inner: Pool, *, killed_after: int | None = None, poison: int | None = None):
        self.inner, self.killed_after, self.poison = inner, killed_after, poison
        self.shards: list[int] = []

    def map(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        for index, request in enumerate(requests):
            shard = request.arguments["first"] // 16
            if len(self.shards) == self.killed_after:
                raise KeyboardInterrupt
            self.shards.append(shard)
            if shard == self.poison:
                yield Outcome(index, None, PoolError("make_shard failed 3 times and is set aside"))
                continue
            (outcome,) = self.inner.map([request])
            yield Outcome(index, outcome.value, outcome.error)


@pytest.fixture
def spec(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """Three shards of sixteen pairs."""
    return specs[SPEC]


@pytest.fixture
def expected(made: Storage, spec: PairSpec) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    return _files(made, spec)


def _files(storage: Storage, spec: PairSpec) -> dict[str, bytes]:
    store = PairStore(storage, spec)
    names = [name for name in storage.names(store.folder) if name != FILE]  # durations differ
    return {name: storage.read(f"{store.folder}/{name}") for name in names}


def _pool(storage: Storage, host_settings: Callable[..., HostSettings], **failure: int) -> CountingPool:
    return CountingPool(LocalPool(Host(host_settings(storage))), **failure)


def _ensure(storage: Storage, spec: PairSpec, pool: Pool) -> list[str]:
    """Make the pairs and return the notes."""
    notes: list[str] = []
    ensure_pairs(storage, [spec], pool, wait=False, announce=notes.append)
    return notes


def test_a_complete_store_is_not_remade(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """With the manifest and undamaged shards, no request is sent to a host."""
    pool = _pool(copied, host_settings)
    assert _ensure(copied, spec, pool) == []
    assert pool.shards == []
    assert _files(copied, spec) == expected


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    killed_after: int,
) -> None:
    """Only the missing shards are made. Shards and manifest have the same bytes as those of an undisturbed run."""
    with pytest.raises(KeyboardInterrupt):
        _ensure(storage, spec, _pool(storage, host_settings, killed_after=killed_after))
    assert not PairStore(storage, spec).is_complete()
    pool = _pool(storage, host_settings)
    _ensure(storage, spec, pool)
    assert pool.shards == list(range(killed_after, 3))
    assert _files(storage, spec) == expected


def test_a_run_killed_before_its_manifest_remakes_no_shard(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """The manifest is made from the existing shards."""
    copied.delete(PairStore(copied, spec).manifest_key)
    pool = _pool(copied, host_settings)
    _ensure(copied, spec, pool)
    assert pool.shards == []
    assert _files(copied, spec) == expected


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "of another spec"])
def test_only_a_damaged_shard_is_remade_with_the_same_bytes(
    copied: Storage,
    spec: PairSpec,
    specs: dict[PairKey, PairSpec],
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    how: str,
    committed: bool,
) -> None:
    """Whatever the damage, and with or without the manifest."""
    store = PairStore(copied, spec)
    key = store.shard_key(SECOND)
    data = bytearray(copied.read(key))
    if how == "missing":
        copied.delete(key)
    elif how == "truncated":
        copied.write(key, bytes(data[: len(data) // 2]))
    elif how == "flipped":
        data[len(data) // 3] ^= 0x10
        copied.write(key, bytes(data))
    else:
        copied.write(key, copied.read(PairStore(copied, specs[PairKey("test", 1.0, 0)]).shard_key(SECOND)))
    if not committed:
        copied.delete(store.manifest_key)
    pool = _pool(copied, host_settings)
    notes = _ensure(copied, spec, pool)
    assert pool.shards == [1]
    assert _files(copied, spec) == expected
    assert notes == ([f"{copied.root}/{store.folder}: remaking 1 damaged or missing shard(s)"] if committed else [])


def test_a_store_with_a_shard_being_remade_is_not_complete(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """A run killed meanwhile leaves no manifest: opening the store is an error, and the next run resumes."""
    store = PairStore(copied, spec)
    copied.delete(store.shard_key(SECOND))
    with pytest.raises(KeyboardInterrupt):
        _ensure(copied, spec, _pool(copied, host_settings, killed_after=0))
    assert not store.is_complete()
    pool = _pool(copied, host_settings)
    _ensure(copied, spec, pool)
    assert pool.shards == [1]
    assert _files(copied, spec) == expected


def test_a_damaged_manifest_is_rebuilt_from_the_shards(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """The shards are undamaged, so no pair is solved again."""
    store = PairStore(copied, spec)
    copied.write(store.manifest_key, copied.read(store.manifest_key)[:100])
    pool = _pool(copied, host_settings)
    notes = _ensure(copied, spec, pool)
    assert pool.shards == []
    assert _files(copied, spec) == expected
    assert notes == [f"{copied.root}/{store.manifest_key} is damaged: rebuilding it from the shards"]


def test_the_error_names_a_failed_shard_and_the_others_are_kept(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """A request that always fails costs only its own shard."""
    with pytest.raises(PoolError) as caught:
        _ensure(storage, spec, _pool(storage, host_settings, poison=1))
    message = str(caught.value)
    assert f"1 of 3 shards of {storage.root}/pairs/{spec.digest} could not be made (shards 1): make_shard" in message
    assert "the other shards are kept; run the same command again" in message
    assert not PairStore(storage, spec).is_complete()
    pool = _pool(storage, host_settings)
    _ensure(storage, spec, pool)
    assert pool.shards == [1]
    assert _files(storage, spec) == expected


def test_a_full_disk_is_reported_and_the_same_command_resumes(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Complete shards are kept; once there is space, only the others are made."""
    pool = _pool(storage, host_settings)
    real = Storage.write

    def write(self: Storage, key: str, data: bytes) -> None:
        if "shard-00001" in key:
            raise StoreError(f"no space left writing {key}")
        real(self, key, data)

    monkeypatch.setattr(Storage, "write", write)
    with pytest.raises(PoolError, match=r"1 of 3 shards .*\(shards 1\): no space left writing .*shard-00001"):
        _ensure(storage, spec, pool)
    monkeypatch.undo()
    resumed = _pool(storage, host_settings)
    _ensure(storage, spec, resumed)
    assert resumed.shards == [1]
    assert _files(storage, spec) == expected


@pytest.mark.parametrize("count", [17, 24, 48])
def test_a_set_grows_with_the_files_it_has(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    made: Storage,
    count: int,
) -> None:
    """Only missing batches are made, and pair i is the same whatever the order in which the set has grown."""
    first = dataclasses.replace(spec, count=count - 5)
    _ensure(storage, first, _pool(storage, host_settings))
    before = _files(storage, first)
    pool = _pool(storage, host_settings)
    larger = dataclasses.replace(spec, count=count)
    _ensure(storage, larger, pool)
    assert PairStore(storage, larger).folder == PairStore(storage, first).folder
    after = _files(storage, larger)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert len(pool.shards) == (first.made != larger.made)
    whole = PairStore(made, spec).load()
    for each in (first, larger):
        loaded = PairStore.open(storage, each.name).load()
        assert len(loaded) == each.count
        for column in ("x0", "x1", "condition", "nfe"):
            assert torch.equal(getattr(loaded, column), getattr(whole, column)[: each.count])


def test_whoever_needs_fewer_pairs_uses_the_first_ones(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """Nothing is made or written, and a shard that reaches beyond them is cut."""
    fewer = dataclasses.replace(spec, count=21)
    pool = _pool(copied, host_settings)
    assert _ensure(copied, fewer, pool) == []
    assert pool.shards == []
    assert _files(copied, spec) == expected
    store = PairStore.open(copied, fewer.name)
    assert torch.equal(store.load().x1, PairStore(copied, spec).load().x1[:21])
    assert torch.equal(store.load_shard(1).x1, PairStore(copied, spec).load().x1[16:21])


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_growth_that_is_killed_leaves_the_old_set_and_resumes(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], made: Storage, killed_after: int
) -> None:
    """The new files count once the manifest names them; until then, the old manifest and its files are in place."""
    small = dataclasses.replace(spec, count=8)
    _ensure(storage, small, _pool(storage, host_settings))
    manifest = storage.read(PairStore(storage, small).manifest_key)
    with pytest.raises(KeyboardInterrupt):
        _ensure(storage, spec, _pool(storage, host_settings, killed_after=killed_after))
    assert storage.read(PairStore(storage, small).manifest_key) == manifest
    assert len(PairStore.open(storage, small.name).load()) == 8
    with pytest.raises(StoreError, match=rf"has 8 pairs, not {spec.count}; make them with `bespoke pairs`"):
        PairStore.open(storage, spec.name)
    pool = _pool(storage, host_settings)
    _ensure(storage, spec, pool)
    assert pool.shards == list(range(killed_after, 3))
    assert torch.equal(PairStore.open(storage, spec.name).load().x1, PairStore(made, spec).load().x1)


def test_files_that_no_manifest_names_are_deleted_once_it_is_written(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings]
) -> None:
    """A killed run for 16 pairs made a part of the shard that a run for 8 pairs has made besides."""
    store = PairStore(storage, dataclasses.replace(spec, count=8))
    host = Host(host_settings(storage))
    for first, stop in ((8, 16), (0, 8), (0, 16)):
        host.make_shard(spec, first, stop)
    pool = _pool(storage, host_settings)
    _ensure(storage, store.spec, pool)
    assert pool.shards == []
    assert storage.names(store.folder) == ["manifest.json", "shard-00000.parquet"]


def test_a_damaged_part_of_a_set_that_has_grown_is_remade_alone(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], made: Storage
) -> None:
    """The parts of its shard that are intact stay, also those beyond the pairs that are needed."""
    for count in (8, 24, 48):
        grown = dataclasses.replace(spec, count=count)
        _ensure(storage, grown, _pool(storage, host_settings))
    before = _files(storage, spec)
    assert {"shard-00000-0-8.parquet", "shard-00000-8-16.parquet", "shard-00001-0-8.parquet"} < set(before)
    storage.write(f"{PairStore(storage, spec).folder}/shard-00000-8-16.parquet", b"damaged")
    pool = _pool(storage, host_settings)
    _ensure(storage, dataclasses.replace(spec, count=20), pool)
    assert pool.shards == [0]
    assert _files(storage, spec) == before


@pytest.mark.parametrize("kind", ["object_store", "s3_storage"])
def test_pairs_on_an_object_store_have_the_same_bytes(
    pool: LocalPool,
    spec: PairSpec,
    expected: dict[str, bytes],
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store without folders or locks has the same contents as a directory."""
    destination: Storage = request.getfixturevalue(kind)
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.001)
    monkeypatch.setattr(pool.host, "storage", destination)
    _ensure(destination, spec, pool)
    assert _files(destination, spec) == expected
    assert _ensure(destination, spec, pool) == []


@pytest.mark.cluster
@pytest.mark.parametrize("hosts", [1, 2])
def test_any_number_of_hosts_makes_the_same_bytes(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    ray_pool: Callable[..., RayPool],
    expected: dict[str, bytes],
    hosts: int,
) -> None:
    """Shards and manifest are byte-identical for 1 or 2 host actors and for the host in this process."""
    _ensure(storage, spec, ray_pool(host_settings(storage), hosts))
    assert _files(storage, spec) == expected
    assert sorted(path.name for path in Path(storage.root).rglob("*") if path.is_file()) == sorted(
        [*expected, FILE, ".lock"]
    )


def test_costs_are_kept_by_file_and_grow_when_a_file_is_made_again(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings]
) -> None:
    """The evaluations are those of the manifest, and a file that was damaged has cost twice as much."""
    _ensure(storage, spec, _pool(storage, host_settings))
    store = PairStore(storage, spec)
    costs = load_costs(storage, store.folder)
    assert costs is not None
    assert {item: cost.evaluations for item, cost in costs.items()} == {
        cost_item(record.indices): record.nfe_sum for record in store.records()
    }
    assert all(cost.seconds is not None and cost.seconds > 0 for cost in costs.values())
    storage.write(store.shard_key(range(16, 32)), b"damaged")
    _ensure(storage, spec, _pool(storage, host_settings))
    again = load_costs(storage, store.folder)
    assert again is not None
    assert again["16-31"].evaluations == 2 * costs["16-31"].evaluations
    assert again["0-15"] == costs["0-15"]
