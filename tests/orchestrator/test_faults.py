"""Storage that fails one operation in twenty, and disks that are full: nothing is lost, nothing is half there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from faulty_filesystem import FaultyFileSystem

from orchestrator import lock
from orchestrator import storage as storage_module
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import PoolError, StoreError, UnreachableStorageError, UserError
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage

ROOT = "s3://bucket/root"

Faulty = Callable[..., FaultyFileSystem]


@pytest.fixture
def spec(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """Three shards of sixteen pairs."""
    return specs[PairKey("train", 1.0, 0)]


@pytest.fixture
def expected(made: Storage, spec: PairSpec) -> dict[str, bytes]:
    """The objects of an undisturbed run, by their paths in the faulty store."""
    folder = PairStore(made, spec).folder
    return {f"bucket/root/{folder}/{name}": made.read(f"{folder}/{name}") for name in made.names(folder)}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, pool: LocalPool, expected: dict[str, bytes]) -> Faulty:
    """Puts a faulty store in the place of every storage, also of the host's in this process."""

    def begin(**faults: float) -> FaultyFileSystem:
        store = FaultyFileSystem(**faults)  # type: ignore[arg-type]
        filesystem = pafs.PyFileSystem(store)
        monkeypatch.setattr(Storage, "_located", property(lambda self: (filesystem, "bucket/root")))
        monkeypatch.setattr(pool.host, "storage", Storage(ROOT))
        monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.0)
        monkeypatch.setattr(lock, "POLL_SECONDS", 0.001)
        return store

    return begin


def _run_until_done(
    spec: PairSpec, pool: LocalPool, after_each: Callable[[], None], most: int = 1000
) -> tuple[int, list[UserError]]:
    """The command again and again, as a user would; how often it was run, and the errors it ended with."""
    errors: list[UserError] = []
    for run in range(1, most + 1):
        try:
            ensure_pairs(Storage(ROOT), [spec], pool, wait=True, note=lambda sentence: None)
        except UserError as error:
            errors.append(error)
            after_each()
        else:
            return run, errors
    raise AssertionError(f"not done after {most} runs; the last error: {errors[-1]}")


def _without_lock(store: FaultyFileSystem) -> dict[str, bytes]:
    return {name: data for name, data in store.objects.items() if not name.endswith("/.lock")}


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_made_in_one_run_on_storage_that_fails_one_operation_in_twenty(
    spec: PairSpec, pool: LocalPool, expected: dict[str, bytes], faulty: Faulty, seed: int
) -> None:
    """Asked again, storage gives the same objects as an undisturbed run: shards and manifest, byte for byte."""
    store = faulty(rate=0.05, seed=seed)
    for _ in range(5):  # complete, damaged and missing shards alike
        runs, errors = _run_until_done(spec, pool, lambda: None)
        assert (runs, errors) == (1, [])
        assert _without_lock(store) == expected
        store.objects.popitem()
        store.objects.pop(next(iter(store.objects)))
    injected = sum(store.injected.values())
    assert injected > 0
    print(f"seed {seed}: {injected} of {sum(store.operations.values())} operations failed, none noticed")


@pytest.mark.parametrize("seed", range(5))
def test_without_asking_again_each_run_ends_with_a_clear_error_and_the_next_goes_on(
    spec: PairSpec,
    pool: LocalPool,
    expected: dict[str, bytes],
    faulty: Faulty,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Every failure reaches the user: an error with the remedy, never a half-written object, and work that is kept."""
    store = faulty(rate=0.05, seed=seed)
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.05)  # a run that cannot give its lease back leaves it to lapse

    def nothing_half_written() -> None:
        for name, data in _without_lock(store).items():
            assert data == expected[name], name

    runs, errors = _run_until_done(spec, pool, nothing_half_written)
    assert _without_lock(store) == expected
    assert all(isinstance(error, UnreachableStorageError | PoolError) for error in errors)
    assert all("run the same command again" in str(error) for error in errors)
    print(f"seed {seed}: {sum(store.injected.values())} faults, {runs} runs until all was made")


def test_asking_again_ends(faulty: Faulty) -> None:
    """Storage that is down for good is an error with the name of the storage, what was tried, and how often."""
    store = faulty(rate=1.0)
    storage = Storage(ROOT)
    for action in (
        lambda: storage.read("object"),
        lambda: storage.write("object", b"data"),
        lambda: storage.exists("object"),
        lambda: storage.names(""),
        lambda: storage.delete("object"),
        lambda: storage.delete_leftovers(""),
    ):
        store.operations.clear()
        with pytest.raises(
            UnreachableStorageError,
            match=r"storage s3://bucket/root failed to .* \(4 attempts\): .*injected.*; when it can be used, run",
        ):
            action()
        assert sum(store.operations.values()) == storage_module.ATTEMPTS
    assert store.objects == {}


def test_an_object_that_is_not_there_is_asked_for_once(faulty: Faulty) -> None:
    """That is an answer."""
    store = faulty()
    with pytest.raises(FileNotFoundError):
        Storage(ROOT).read("object")
    assert store.operations == {"open": 1}


def test_a_full_store_ends_the_run_and_the_next_goes_on(
    spec: PairSpec, pool: LocalPool, expected: dict[str, bytes], faulty: Faulty
) -> None:
    """Room for some shards: they are kept, the error names the space, and with more room only the rest is made."""
    shard = len(next(data for name, data in expected.items() if name.endswith(".parquet")))
    store = faulty(room=int(1.5 * shard))
    with pytest.raises(
        PoolError, match=r"2 of 3 shards .* could not be made .*no space left writing s3://bucket/root/"
    ):
        ensure_pairs(Storage(ROOT), [spec], pool, wait=True, note=lambda sentence: None)
    kept = _without_lock(store)
    assert len(kept) == 1
    assert all(expected[name] == data for name, data in kept.items())
    store.room = None
    ensure_pairs(Storage(ROOT), [spec], pool, wait=True, note=lambda sentence: None)
    assert _without_lock(store) == expected


# ---- a disk that is really full -----------------------------------------------------------------------------------

ON_A_SMALL_DISK = """
import hashlib, json, pathlib, subprocess, sys
from orchestrator.errors import UserError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage

root, told = sys.argv[1], {}
spec = PairSpec.from_dict(json.loads(sys.argv[2]))
pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=root)))
for size in ("4k", "24k", "32k", "1m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", root], check=True)
    try:
        ensure_pairs(Storage.at(root), [spec], pool, wait=False, note=lambda sentence: None)
        error = None
    except UserError as refusal:
        error = str(refusal)
    files = {path.name: path.read_bytes() for path in pathlib.Path(root).rglob("*") if path.is_file()}
    told[size] = error, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_really_full_disk_ends_the_run_and_leaves_only_whole_files(
    tmp_path: Path, spec: PairSpec, expected: dict[str, bytes]
) -> None:
    """A tmpfs too small for anything, for one shard, for all: each run ends clearly, and the last has all the bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs "$0" && exec "$@"', str(disk)]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(disk), json.dumps(asdict(spec))]
    done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    whole = {name.rpartition("/")[2]: hashlib.sha256(data).hexdigest() for name, data in expected.items()}
    for size, (error, files) in told.items():
        files.pop(".lock", None)
        assert {name: whole[name] for name in files} == files, size
        assert (error is None) == (files == whole), size
        if error is not None:
            assert "No space left" in error or "no space left" in error
    assert told["1m"][0] is None
    assert 0 < len(told["32k"][1]) < len(whole), [len(files) for _, files in told.values()]


def test_a_lock_on_a_full_disk_is_a_lock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner's name finds no room; what it protects is protected."""

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with (
        lock.exclusive(storage, "store/.lock", wait=False, announce=lambda sentence: None),
        pytest.raises(StoreError, match=r"is in use by \? on \?"),
        lock.exclusive(storage, "store/.lock", wait=False, announce=lambda sentence: None),
    ):
        pytest.fail("two owners at once")
