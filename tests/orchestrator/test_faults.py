"""Storage that fails one operation in twenty, and full disks: nothing is lost and no object is half-written."""

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

from orchestrator import cost, lock
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
    """The objects of an undisturbed run, by their paths in the faulty store, without the times that it took."""
    folder = PairStore(made, spec).folder
    names = set(made.names(folder)) - {cost.FILE}
    return {f"bucket/root/{folder}/{name}": made.read(f"{folder}/{name}") for name in names}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, pool: LocalPool, expected: dict[str, bytes]) -> Faulty:
    """Replaces every storage, including the one of the host in this process, by a faulty store."""

    def start(**faults: float) -> FaultyFileSystem:
        store = FaultyFileSystem(**faults)  # type: ignore[arg-type]
        filesystem = pafs.PyFileSystem(store)
        monkeypatch.setattr(Storage, "_located", property(lambda self: (filesystem, "bucket/root")))
        monkeypatch.setattr(pool.host, "storage", Storage(ROOT))
        monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.0)
        monkeypatch.setattr(lock, "POLL_SECONDS", 0.001)
        return store

    return start


def _run_until_done(
    spec: PairSpec, pool: LocalPool, after_each: Callable[[], None], max_runs: int = 1000
) -> tuple[int, list[UserError]]:
    """Rerun the command until it succeeds, as a user would; return the number of runs and the errors on the way."""
    errors: list[UserError] = []
    for run in range(1, max_runs + 1):
        try:
            ensure_pairs(Storage(ROOT), [spec], pool, wait=True, announce=lambda sentence: None)
        except UserError as error:
            errors.append(error)
            after_each()
        else:
            return run, errors
    raise AssertionError(f"not done after {max_runs} runs; the last error: {errors[-1]}")


def _without_lock(store: FaultyFileSystem) -> dict[str, bytes]:
    return {name: data for name, data in store.objects.items() if not name.endswith(("/.lock", f"/{cost.FILE}"))}


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_made_in_one_run_on_storage_that_fails_one_operation_in_twenty(
    spec: PairSpec, pool: LocalPool, expected: dict[str, bytes], faulty: Faulty, seed: int
) -> None:
    """Retries hide the failures: shards and manifest are those of an undisturbed run, byte for byte."""
    store = faulty(rate=0.05, seed=seed)
    for _ in range(5):  # with complete, damaged and missing shards
        runs, errors = _run_until_done(spec, pool, lambda: None)
        assert (runs, errors) == (1, [])
        assert _without_lock(store) == expected
        store.objects.popitem()
        store.objects.pop(next(iter(store.objects)))
    injected = sum(store.injected.values())
    assert injected > 0
    print(f"seed {seed}: {injected} of {sum(store.operations.values())} operations failed, none noticed")


@pytest.mark.parametrize("seed", range(5))
def test_without_retries_each_run_ends_with_a_clear_error_and_the_next_one_resumes(
    spec: PairSpec,
    pool: LocalPool,
    expected: dict[str, bytes],
    faulty: Faulty,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """A failed run ends with an error that names the remedy, keeps finished work and leaves no half-written object."""
    store = faulty(rate=0.05, seed=seed)
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.05)  # a run that cannot release its lease lets it expire

    def nothing_half_written() -> None:
        for name, data in _without_lock(store).items():
            assert data == expected[name], name

    runs, errors = _run_until_done(spec, pool, nothing_half_written)
    assert _without_lock(store) == expected
    assert all(isinstance(error, UnreachableStorageError | PoolError) for error in errors)
    assert all("run the same command again" in str(error) for error in errors)
    print(f"seed {seed}: {sum(store.injected.values())} faults, {runs} runs until every pair was made")


def test_retries_are_limited(faulty: Faulty) -> None:
    """If storage stays down, the error names the storage, the operation and the number of attempts."""
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


def test_reading_a_missing_object_is_not_retried(faulty: Faulty) -> None:
    """A missing object is an answer, not a failure."""
    store = faulty()
    with pytest.raises(FileNotFoundError):
        Storage(ROOT).read("object")
    assert store.operations == {"open": 1}


def test_a_full_store_ends_the_run_and_the_next_run_resumes(
    spec: PairSpec, pool: LocalPool, expected: dict[str, bytes], faulty: Faulty
) -> None:
    """Shards that fit are kept and the error names the space; with more room only the remaining shards are made."""
    shard = len(next(data for name, data in expected.items() if name.endswith(".parquet")))
    store = faulty(room=int(1.5 * shard))
    with pytest.raises(
        PoolError, match=r"2 of 3 shards .* could not be made .*no space left writing s3://bucket/root/"
    ):
        ensure_pairs(Storage(ROOT), [spec], pool, wait=True, announce=lambda sentence: None)
    kept = _without_lock(store)
    assert len(kept) == 1
    assert all(expected[name] == data for name, data in kept.items())
    store.room = None
    ensure_pairs(Storage(ROOT), [spec], pool, wait=True, announce=lambda sentence: None)
    assert _without_lock(store) == expected


# ---- a full tmpfs --------------------------------------------------------------------------------------------------

ON_A_SMALL_DISK = """
import hashlib, json, pathlib, subprocess, sys
from orchestrator.errors import UserError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage

root, outcomes = sys.argv[1], {}
content = json.loads(sys.argv[2])
spec = PairSpec.from_dict(content, content["count"])
pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=root)))
for size in ("4k", "24k", "32k", "1m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", root], check=True)
    try:
        ensure_pairs(Storage.at(root), [spec], pool, wait=False, announce=lambda sentence: None)
        error = None
    except UserError as caught:
        error = str(caught)
    files = {path.name: path.read_bytes() for path in pathlib.Path(root).rglob("*") if path.is_file()}
    outcomes[size] = error, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_a_full_tmpfs_ends_the_run_and_leaves_only_complete_files(
    tmp_path: Path, spec: PairSpec, expected: dict[str, bytes]
) -> None:
    """Too small for the lock, for one shard, for all shards, then large enough: only the last run completes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs "$0" && exec "$@"', str(disk)]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(disk), json.dumps(asdict(spec))]
    done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    complete = {name.rpartition("/")[2]: hashlib.sha256(data).hexdigest() for name, data in expected.items()}
    for size, (error, files) in outcomes.items():
        for name in (".lock", cost.FILE):
            files.pop(name, None)
        assert {name: complete[name] for name in files} == files, size
        assert (error is None) == (files == complete), size
        if error is not None:
            assert "No space left" in error or "no space left" in error
    assert outcomes["1m"][0] is None
    assert 0 < len(outcomes["32k"][1]) < len(complete), [len(files) for _, files in outcomes.values()]


def test_a_lock_on_a_full_disk_still_excludes_other_owners(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no space to write the owner's name, but the lock itself works."""

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with (
        lock.exclusive(storage, "store/.lock", wait=False, announce=lambda sentence: None),
        pytest.raises(StoreError, match=r"is in use by \? on \?"),
        lock.exclusive(storage, "store/.lock", wait=False, announce=lambda sentence: None),
    ):
        pytest.fail("two owners at once")
