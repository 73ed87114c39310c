"""Exclusive lock on a store: a second writer waits and names the owner, or fails at once.

On a directory the lock is ``flock``, which the kernel releases when the process ends for any reason. On an object
store it is a lease: an object with the owner's name, renewed while the work goes on, which lapses when renewal stops.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import BusyStoreError, StoreError
from orchestrator.progress import LINE_SECONDS, Note
from orchestrator.storage import Storage

POLL_SECONDS = 1.0
LEASE_SECONDS = 60.0


@contextmanager
def exclusive(storage: Storage, key: str, *, wait: bool, announce: Note) -> Iterator[None]:
    """Hold ``key`` while the block runs.

    Args:
        storage: Where the lock lives.
        key: Name of the lock.
        wait: Whether to wait for another owner or fail at once.
        announce: Called with a sentence that names the owner, if waiting is necessary.

    Raises:
        BusyStoreError: Another process holds it and ``wait`` is false.
    """
    hold = _flock if storage.is_local else _lease
    with hold(storage, key, wait=wait, announce=announce):
        yield


def _owner() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        user = str(os.getuid())
    return {"user": user, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%H:%M:%S")}


def _busy(where: str, owner: dict[str, Any]) -> str:
    user, host, pid, since = (str(owner.get(key, "?"))[:64] for key in ("user", "host", "pid", "since"))
    return f"{where} is in use by {user} on {host} (process {pid}) since {since}"


@contextmanager
def _flock(storage: Storage, key: str, *, wait: bool, announce: Note) -> Iterator[None]:
    path = Path(storage.path(key))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the next statement closes it)
    except OSError as error:
        raise StoreError(f"cannot create {path}: {error}; free some space or choose another --storage") from error
    with opened as file:
        spoken = -math.inf
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sentence = _busy(storage.location(key.rpartition("/")[0]), _parse(path.read_bytes()))
                if not wait:
                    raise BusyStoreError(f"{sentence}; wait for it, or leave out --no-wait") from None
                if time.monotonic() - spoken >= LINE_SECONDS:
                    announce(f"{sentence}; waiting for it to finish")
                    spoken = time.monotonic()
                time.sleep(POLL_SECONDS)
        with suppress(OSError):  # on a full disk the lock still holds, but without the owner's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(_owner()).encode())
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _lease(storage: Storage, key: str, *, wait: bool, announce: Note) -> Iterator[None]:
    token = uuid.uuid4().hex
    spoken = -math.inf
    while not _try_lease(storage, key, token):
        sentence = _busy(storage.location(key.rpartition("/")[0]), _current(storage, key))
        if not wait:
            raise BusyStoreError(f"{sentence}; wait for it, or leave out --no-wait")
        if time.monotonic() - spoken >= LINE_SECONDS:
            announce(f"{sentence}; waiting for it to finish, or for its lease of {LEASE_SECONDS:g} s to lapse")
            spoken = time.monotonic()
        time.sleep(POLL_SECONDS)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 4):
            with suppress(OSError, StoreError):  # the next attempt follows after a quarter of the lease
                if _is_ours(storage, key, token):
                    _write_lease(storage, key, token)

    renewer = threading.Thread(target=renew, daemon=True)
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        with suppress(OSError, StoreError):  # the work is complete, and the lease lapses by itself
            if _is_ours(storage, key, token):
                storage.delete(key)


def _try_lease(storage: Storage, key: str, token: str) -> bool:
    current = _current(storage, key)
    until = current.get("until")
    if isinstance(until, int | float) and until > time.time():
        return False
    _write_lease(storage, key, token)
    # If two processes write at once, the last write wins; after a pause both read the same lease.
    time.sleep(POLL_SECONDS)
    return _is_ours(storage, key, token)


def _is_ours(storage: Storage, key: str, token: str) -> bool:
    """Whether the lease is ours; false if it lapsed (the process was suspended, say) and another owner took it."""
    return _current(storage, key).get("token") == token


def _write_lease(storage: Storage, key: str, token: str) -> None:
    content = {**_owner(), "token": token, "until": time.time() + LEASE_SECONDS}
    storage.write(key, json.dumps(content).encode())


def _current(storage: Storage, key: str) -> dict[str, Any]:
    try:
        return _parse(storage.read(key))
    except FileNotFoundError:
        return {}


def _parse(data: bytes) -> dict[str, Any]:
    """The owner's record from a lock file; empty if it cannot be parsed."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
