"""One writer at a time: the second waits and says for whom, or fails at once; the dead hold nothing."""

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
"""Of the other process; long enough for a busy machine to renew it in time."""

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


def _waiter(storage: Storage, told: list[str]) -> tuple[threading.Thread, threading.Event]:
    """A second owner in a thread, which waits; and the sign that it has the lock."""
    has_it = threading.Event()

    def run() -> None:
        with exclusive(storage, KEY, wait=True, announce=told.append):
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
    """Each kind of storage: on a directory the lock is flock, on the others a lease."""
    return request.getfixturevalue(request.param)


def test_the_second_waits_and_says_for_whom(place: Storage) -> None:
    """Told once, with user, host and process; it goes on when the first is done."""
    told: list[str] = []
    with exclusive(place, KEY, wait=False, announce=told.append):
        assert told == []
        thread, has_it = _waiter(place, told)
        _until(lambda: told)
        time.sleep(0.1)
        assert not has_it.is_set()
    _until(has_it.is_set)
    thread.join()
    (sentence,) = told
    owner = f"{getpass.getuser()} on {socket.gethostname()} (process {os.getpid()}) since "
    assert sentence.startswith(f"{place.location('pairs/digest')} is in use by {owner}")
    assert "; waiting for it to finish" in sentence


def test_without_waiting_the_second_fails_at_once(place: Storage) -> None:
    """--no-wait: an error that says who is at work, and what to do."""
    with (
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
        pytest.raises(BusyStoreError) as caught,
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
    ):
        pytest.fail("two owners at once")
    assert f"{place.location('pairs/digest')} is in use by {getpass.getuser()} on " in str(caught.value)
    assert str(caught.value).endswith("; wait for it, or leave out --no-wait")


def test_one_after_the_other_nobody_waits(place: Storage) -> None:
    """A lock that was given back is free, also after an error in the block."""
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            exclusive(place, KEY, wait=False, announce=lambda sentence: pytest.fail(sentence)),
        ):
            _ = 1 / 0


def test_two_stores_are_worked_on_at_once(place: Storage) -> None:
    """A lock is its store's own."""
    with (
        exclusive(place, KEY, wait=False, announce=lambda sentence: None),
        exclusive(place, "pairs/other/.lock", wait=False, announce=lambda sentence: None),
    ):
        pass


@pytest.fixture(params=["storage", "s3_storage"])
def shared(request: pytest.FixtureRequest) -> Storage:
    """What two processes can share."""
    return request.getfixturevalue(request.param)


def test_another_process_is_named_and_its_death_frees_the_lock(shared: Storage) -> None:
    """Killed with SIGKILL it can clean up nothing: the kernel does, or its lease lapses."""
    storage = shared
    told: list[str] = []
    with _other_process(storage) as process:
        with (
            pytest.raises(BusyStoreError, match=rf"\(process {process.pid}\) since .*leave out --no-wait"),
            exclusive(storage, KEY, wait=False, announce=told.append),
        ):
            pytest.fail("two owners at once")
        thread, has_it = _waiter(storage, told)
        _until(lambda: told)
        assert f"(process {process.pid})" in told[0]
        assert not has_it.is_set()
        os.kill(process.pid, signal.SIGKILL)
        _until(has_it.is_set)
        thread.join()


def test_a_lock_file_that_says_nothing_does_not_hinder(storage: Storage) -> None:
    """A file left by another version, or caught between taking the lock and writing one's name."""
    path = Path(storage.path(KEY))
    path.parent.mkdir(parents=True)
    for content in ("", "not JSON", "[1]"):
        path.write_text(content, encoding="utf-8")
        with exclusive(storage, KEY, wait=False, announce=lambda sentence: None):
            assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_a_lease_is_renewed_while_the_work_goes_on(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the work takes, nobody else gets the store."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    with exclusive(object_store, KEY, wait=False, announce=lambda sentence: None):
        time.sleep(1.2)
        with (
            pytest.raises(BusyStoreError, match="is in use by"),
            exclusive(object_store, KEY, wait=False, announce=lambda sentence: None),
        ):
            pytest.fail("the lease lapsed under its owner")
    assert not object_store.exists(KEY)


def test_the_lease_of_the_dead_lapses(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store frees nothing by itself: a lease that is not renewed is over after its time."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    dead = {"user": "ada", "host": "node-7", "pid": 4711, "since": "12:00:00", "token": "x", "until": time.time() + 0.5}
    object_store.write(KEY, json.dumps(dead).encode())
    told: list[str] = []
    begin = time.time()
    with exclusive(object_store, KEY, wait=True, announce=told.append):
        assert time.time() - begin > 0.3
    (sentence,) = told
    assert "is in use by ada on node-7 (process 4711) since 12:00:00; waiting" in sentence
    assert "or for its lease of 0.5 s to lapse" in sentence


def test_an_owner_whose_lease_lapsed_takes_nothing_from_the_next(
    object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was suspended for too long neither renews over the next owner's lease nor gives it back."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.2)
    with exclusive(object_store, KEY, wait=False, announce=lambda sentence: None):
        theirs = json.dumps({"user": "ada", "token": "hers", "until": time.time() + 60}).encode()
        object_store.write(KEY, theirs)
        time.sleep(0.3)
        assert object_store.read(KEY) == theirs
    assert object_store.read(KEY) == theirs


def test_of_two_that_take_a_lease_at_once_one_gets_it(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put cannot be conditional: the last one stands, and the other notices before it works."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.3)
    inside = 0
    most = 0
    guard = threading.Lock()
    together = threading.Barrier(3)

    def work() -> None:
        nonlocal inside, most
        together.wait()
        with exclusive(object_store, KEY, wait=True, announce=lambda sentence: None):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
