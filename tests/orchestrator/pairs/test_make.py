"""Making pairs goes on from wherever it was stopped, mends what is damaged, and ends with the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import PoolError, StoreError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool, Outcome, Pool, Request
from orchestrator.storage import Storage

SPEC = PairKey("train", 1.0, 0)


class CountingPool(Pool):
    """Counts the shards that are asked for; fails in one of the ways a pool can."""

    def __init__(self, inner: Pool, *, killed_after: int | None = None, poison: int | None = None):
        self.inner, self.killed_after, self.poison = inner, killed_after, poison
        self.shards: list[int] = []

    def map(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        for index, request in enumerate(requests):
            shard = request.arguments["shard"]
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
    return {name: storage.read(f"{store.folder}/{name}") for name in storage.names(store.folder)}


def _pool(storage: Storage, host_settings: Callable[..., HostSettings], **failure: int) -> CountingPool:
    return CountingPool(LocalPool(Host(host_settings(storage))), **failure)


def _ensure(storage: Storage, spec: PairSpec, pool: Pool) -> list[str]:
    """Makes the pairs; what was announced."""
    told: list[str] = []
    ensure_pairs(storage, [spec], pool, wait=False, note=told.append)
    return told


def test_a_complete_store_is_never_made_again(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """The manifest and whole shards are enough: no host is asked anything."""
    pool = _pool(copied, host_settings)
    assert _ensure(copied, spec, pool) == []
    assert pool.shards == []
    assert _files(copied, spec) == expected


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    killed_after: int,
) -> None:
    """Only the missing shards are made; shards and manifest are those of an undisturbed run, byte for byte."""
    with pytest.raises(KeyboardInterrupt):
        _ensure(storage, spec, _pool(storage, host_settings, killed_after=killed_after))
    assert not PairStore(storage, spec).is_complete()
    pool = _pool(storage, host_settings)
    _ensure(storage, spec, pool)
    assert pool.shards == list(range(killed_after, 3))
    assert _files(storage, spec) == expected


def test_a_run_killed_before_its_manifest_makes_no_shard_again(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """The manifest is made from the shards that are there."""
    copied.delete(PairStore(copied, spec).manifest_key)
    pool = _pool(copied, host_settings)
    _ensure(copied, spec, pool)
    assert pool.shards == []
    assert _files(copied, spec) == expected


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "of another spec"])
def test_only_a_damaged_shard_is_made_again_with_the_same_bytes(
    copied: Storage,
    spec: PairSpec,
    specs: dict[PairKey, PairSpec],
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    how: str,
    committed: bool,
) -> None:
    """Whatever happened to the file, and whether or not the manifest was there."""
    store = PairStore(copied, spec)
    key = store.shard_key(1)
    data = bytearray(copied.read(key))
    if how == "missing":
        copied.delete(key)
    elif how == "truncated":
        copied.write(key, bytes(data[: len(data) // 2]))
    elif how == "flipped":
        data[len(data) // 3] ^= 0x10
        copied.write(key, bytes(data))
    else:
        copied.write(key, copied.read(PairStore(copied, specs[PairKey("test", 1.0, 0)]).shard_key(1)))
    if not committed:
        copied.delete(store.manifest_key)
    pool = _pool(copied, host_settings)
    told = _ensure(copied, spec, pool)
    assert pool.shards == [1]
    assert _files(copied, spec) == expected
    assert told == ([f"{copied.root}/{store.folder}: remaking 1 damaged or missing shard(s)"] if committed else [])


def test_a_store_that_is_being_mended_is_not_called_complete(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """Killed in the middle of mending, it has no manifest: whoever opens it is told so, and the next run goes on."""
    store = PairStore(copied, spec)
    copied.delete(store.shard_key(1))
    with pytest.raises(KeyboardInterrupt):
        _ensure(copied, spec, _pool(copied, host_settings, killed_after=0))
    assert not store.is_complete()
    pool = _pool(copied, host_settings)
    _ensure(copied, spec, pool)
    assert pool.shards == [1]
    assert _files(copied, spec) == expected


def test_a_damaged_manifest_is_made_again_from_the_shards(
    copied: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """The shards are whole: nothing is computed."""
    store = PairStore(copied, spec)
    copied.write(store.manifest_key, copied.read(store.manifest_key)[:100])
    pool = _pool(copied, host_settings)
    told = _ensure(copied, spec, pool)
    assert pool.shards == []
    assert _files(copied, spec) == expected
    assert told == [f"{copied.root}/{store.manifest_key} is damaged: rebuilding it from the shards"]


def test_a_shard_that_cannot_be_made_is_named_and_the_others_are_kept(
    storage: Storage, spec: PairSpec, host_settings: Callable[..., HostSettings], expected: dict[str, bytes]
) -> None:
    """One poison request costs its own shard, not the run's work."""
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


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    storage: Storage,
    spec: PairSpec,
    host_settings: Callable[..., HostSettings],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was complete is kept; once there is space, only the rest is made."""
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
    again = _pool(storage, host_settings)
    _ensure(storage, spec, again)
    assert again.shards == [1]
    assert _files(storage, spec) == expected


@pytest.mark.parametrize("kind", ["object_store", "s3_storage"])
def test_pairs_on_an_object_store_are_the_same_bytes(
    pool: LocalPool,
    spec: PairSpec,
    expected: dict[str, bytes],
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any filesystem: a store without folders or locks holds what a directory holds."""
    place: Storage = request.getfixturevalue(kind)
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.001)
    monkeypatch.setattr(pool.host, "storage", place)
    _ensure(place, spec, pool)
    assert _files(place, spec) == expected
    assert _ensure(place, spec, pool) == []


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
    """1 or 2 host actors, or the host in this process: byte-identical shards and manifest."""
    _ensure(storage, spec, ray_pool(host_settings(storage), hosts))
    assert _files(storage, spec) == expected
    assert sorted(path.name for path in Path(storage.root).rglob("*") if path.is_file()) == sorted([*expected, ".lock"])
