"""One writer at a time: a second one waits and names the owner, or fails at once. Dead processes hold no lock."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import lock
from orchestrator.errors import BusyStoreError
from orchestrator.lock import exclusive
from orchestrator.storage import Storage

KEY = "pairs/digest/.lock"

LEASE_SECONDS = 4.0
"""Lease time in the other process; long enough for a busy machine to renew it."""

HOLDER = f"""
import sys, time
from orchestrator import lock
from orchestrator.lock import exclusive
lock.LEASE_SECONDS = {LEASE_SECONDS}
from orchestrator.storage import Storage
with exclusive(Storage.at(sys.argv[1]), sys.argv[2], wait=False, announce=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)


@contextmanager
def _other_process(storage: Storage) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, storage.root, KEY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _waiter(storage: Storage, notes: list[str]) -> tuple[threading.Thread, threading.Event]:
    """Start a thread that waits for the lock; return it, and an event that is set once it has the lock."""
    has_it = threading.Event()

    def run() -> None:
        with exclusive(storage, KEY, wait=True, announce=notes.append):
            has_it.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, has_it


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "nothing happened in 30 seconds"
        time.sleep(0.01)


@pytest.fixture(params=["storage", "object_store", "s3_storage"])
def place(request: pytest.FixtureRequest) -> Storage:
    """Each kind of storage: the lock is a flock on a directory, and a lease elsewhere."""
    return request.getfixturevalue(request.param)


def test_a_second_owner_waits_and_names_the_first(place: Storage) -> None:
    """A single note names the user, host and process; the work continues once the first owner is done."""
    notes: list[str] = []
    with exclusive(place, KEY, wait=False, announce=notes.append):
        assert notes == []
        thread, has_it = _waiter(place, notes)
        _until(lambda: notes)
        time.sleep(0.1)
        assert not has_it.is_set()
    _until(has_it.is_set)
    thread.join()
    (sentence,) = notes
    owner = f"{getpass.getuser()} on {socket.gethostname()} (process {os.getpid()}) since "
    assert sentence.startswith(f"{place.location('pairs/digest')} is in use by {owner}")
    assert "; waiting for it to finish" in sentence


def test_with_no_wait_a_second_owner_fails_at_once(place: Storage) -> None:
    """The error names the current owner and what to do."""
    with (
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
        pytest.raises(BusyStoreError) as caught,
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
    ):
        pytest.fail("two owners at once")
    assert f"{place.location('pairs/digest')} is in use by {getpass.getuser()} on " in str(caught.value)
    assert str(caught.value).endswith("; wait for it, or leave out --no-wait")


def test_a_released_lock_is_free(place: Storage) -> None:
    """This includes a lock released by an error in the block."""
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            exclusive(place, KEY, wait=False, announce=lambda sentence: pytest.fail(sentence)),
        ):
            _ = 1 / 0


def test_locks_of_two_stores_are_independent(place: Storage) -> None:
    """Each store has a lock of its own."""
    with (
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
        exclusive(place, "pairs/other/.lock", wait=False, announce=lambda sentence: None),
    ):
        pass


@pytest.fixture(params=["storage", "s3_storage"])
def shared(request: pytest.FixtureRequest) -> Storage:
    """Storages that two processes can share."""
    return request.getfixturevalue(request.param)


def test_another_owner_process_is_named_and_its_death_frees_the_lock(shared: Storage) -> None:
    """A process killed by SIGKILL cleans up nothing: the kernel frees its flock, or its lease expires."""
    storage = shared
    notes: list[str] = []
    with _other_process(storage) as process:
        with (
            pytest.raises(BusyStoreError, match=rf"\(process {process.pid}\) since .*leave out --no-wait"),
            exclusive(storage, KEY, wait=False, announce=notes.append),
        ):
            pytest.fail("two owners at once")
        thread, has_it = _waiter(storage, notes)
        _until(lambda: notes)
        assert f"(process {process.pid})" in notes[0]
        assert not has_it.is_set()
        os.kill(process.pid, signal.SIGKILL)
        _until(has_it.is_set)
        thread.join()


def test_a_lock_file_without_a_valid_owner_is_ignored(storage: Storage) -> None:
    """Written by another version, or read after the lock was taken and before the owner's name was written."""
    path = Path(storage.path(KEY))
    path.parent.mkdir(parents=True)
    for content in ("", "not JSON", "[1]"):
        path.write_text(content, encoding="utf-8")
        with exclusive(storage, KEY, wait=False, announce=lambda sentence: None):
            assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_a_lease_is_renewed_during_the_work(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the work takes, no other process can take the store."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    with exclusive(object_store, KEY, wait=False, announce=lambda sentence: None):
        time.sleep(1.2)
        with (
            pytest.raises(BusyStoreError, match="is in use by"),
            exclusive(object_store, KEY, wait=False, announce=lambda sentence: None),
        ):
            pytest.fail("the lease lapsed under its owner")
    assert not object_store.exists(KEY)


def test_the_lease_of_a_dead_owner_expires(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store frees no lease by itself: a lease that is not renewed ends after its time."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    dead = {"user": "ada", "host": "node-7", "pid": 4711, "since": "12:00:00", "token": "x", "until": time.time() + 0.5}
    object_store.write(KEY, json.dumps(dead).encode())
    notes: list[str] = []
    begin = time.time()
    with exclusive(object_store, KEY, wait=True, announce=notes.append):
        assert time.time() - begin > 0.3
    (sentence,) = notes
    assert "is in use by ada on node-7 (process 4711) since 12:00:00; waiting" in sentence
    assert "or for its lease of 0.5 s to lapse" in sentence


def test_an_owner_whose_lease_expired_does_not_disturb_the_next_owner(
    object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was suspended for too long neither renews nor deletes the next owner's lease."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.2)
    with exclusive(object_store, KEY, wait=False, announce=lambda sentence: None):
        theirs = json.dumps({"user": "ada", "token": "hers", "until": time.time() + 60}).encode()
        object_store.write(KEY, theirs)
        time.sleep(0.3)
        assert object_store.read(KEY) == theirs
    assert object_store.read(KEY) == theirs


def test_simultaneous_requests_for_a_lease_are_served_one_at_a_time(
    object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Puts are unconditional: the last write wins, and the other owners notice this before they start work."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.3)
    active = 0
    most_active = 0
    guard = threading.Lock()
    barrier = threading.Barrier(3)

    def work() -> None:
        nonlocal active, most_active
        barrier.wait()
        with exclusive(object_store, KEY, wait=True, announce=lambda sentence: None):
            with guard:
                active += 1
                most_active = max(most_active, active)
            time.sleep(0.05)
            with guard:
                active -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_active == 1
