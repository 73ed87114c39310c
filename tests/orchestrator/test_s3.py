"""Storage on a local S3 server: objects are complete or absent, even if writers are killed or requests fail."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from s3_server import S3Server

from orchestrator import cost
from orchestrator import storage as storage_module
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import BusyStoreError, ConfigError, UnreachableStorageError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.lock import exclusive
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage

LARGE = 24 * 2**20
"""Bytes that need more than one part in a multipart upload."""


@pytest.fixture
def spec(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """Three shards of sixteen pairs."""
    return specs[PairKey("train", 1.0, 0)]


@pytest.fixture
def expected(made: Storage, spec: PairSpec) -> dict[str, bytes]:
    """The files of an undisturbed run on a directory."""
    return _files(made, spec)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the pauses between attempts."""
    monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.01)


def _files(storage: Storage, spec: PairSpec) -> dict[str, bytes]:
    """The objects of a pair set, without the times that it took."""
    store = PairStore(storage, spec)
    names = set(storage.names(store.folder)) - {cost.FILE}
    return {name: storage.read(f"{store.folder}/{name}") for name in names}


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened in 60 seconds"
        time.sleep(0.01)


def test_locations_do_not_contain_the_connection_settings(s3_storage: Storage) -> None:
    """The endpoint and any credentials of the URI are not part of an object's location."""
    s3_storage.write("folder/object", b"data")
    s3_storage.write("object", b"data")
    bucket = s3_storage.root.removeprefix("s3://").partition("/")[0]
    assert s3_storage.names("") == ["folder", "object"]
    assert s3_storage.location("folder/object") == f"s3://{bucket}/root/folder/object"
    secret = Storage(f"s3://key:secret@{bucket}/root?region=eu-west-1")
    assert secret.shown == f"s3://{bucket}/root"
    assert secret.location("a") == f"s3://{bucket}/root/a"


def test_a_root_may_be_a_whole_bucket(s3_storage: Storage) -> None:
    """A URI without a folder, with or without a trailing slash."""
    for ending in ("", "/"):
        storage = Storage.at(s3_storage.root.replace("/root?", f"{ending}?"))
        storage.write("folder/object", b"data")
        assert storage.read("folder/object") == b"data"
        assert storage.names("folder") == ["object"]
        assert "folder" in storage.names("")
        assert storage.location("folder/object").endswith("/folder/object")
        assert "//folder" not in storage.location("folder/object")


def test_a_missing_bucket_is_refused_at_once(s3_server: S3Server) -> None:
    """Retries would not create it; the message contains no credentials."""
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"root s3://no-such-bucket/root cannot be written: .*NO_SUCH_BUCKET.*choose"):
        Storage.at(s3_server.root("no-such-bucket")).check_writable()
    assert time.monotonic() - begin < 2


WRITER = f"""
import sys
from orchestrator.storage import Storage
Storage.at(sys.argv[1]).write("folder/object", b"x" * {LARGE})
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_killed_writer_leaves_nothing_visible(s3_server: S3Server, s3_storage: Storage, old: bytes | None) -> None:
    """After SIGKILL between two parts of an upload, readers see the old object, if any, and the next write succeeds."""
    if old is not None:
        s3_storage.write("folder/object", old)
    uploading, release = threading.Event(), threading.Event()

    def hold_second_part(request: dict[str, Any]) -> bool:
        if "partNumber=2" in request.get("QUERY_STRING", ""):
            uploading.set()
            release.wait(60)
            return True
        return False

    s3_server.fault = hold_second_part
    process = subprocess.Popen([sys.executable, "-c", WRITER, s3_storage.root])
    try:
        assert uploading.wait(60)
        assert s3_storage.names("folder") == ([] if old is None else ["object"])
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finally:
        release.set()
        process.kill()
        process.wait()
    s3_server.fault = None
    assert s3_storage.exists("folder/object") == (old is not None)
    assert s3_storage.names("folder") == ([] if old is None else ["object"])
    if old is not None:
        assert s3_storage.read("folder/object") == old
    s3_storage.write("folder/object", b"new")
    assert s3_storage.read("folder/object") == b"new"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("query", ["uploads", "partNumber=1", "uploadId="])
def test_an_upload_that_breaks_off_keeps_the_old_object(
    s3_server: S3Server, s3_storage: Storage, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its first request, a part or its last request fails for good."""
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)  # each attempt takes the client library seconds
    s3_storage.write("object", b"old")
    s3_server.fault = lambda request: request["REQUEST_METHOD"] != "DELETE" and query in request["QUERY_STRING"]
    with pytest.raises(
        UnreachableStorageError, match=r"failed to write object \(1 attempts\): .*run the same command again"
    ):
        s3_storage.write("object", b"x" * 1000)
    s3_server.fault = None
    assert s3_storage.read("object") == b"old"


@pytest.mark.usefixtures("impatient")
def test_requests_to_storage_are_retried_while_it_fails(s3_server: S3Server, s3_storage: Storage) -> None:
    """Five consecutive failures are more than the retries of the client library cover."""
    for action in (
        lambda: s3_storage.write("object", b"data"),
        lambda: s3_storage.read("object"),
        lambda: s3_storage.exists("object"),
        lambda: s3_storage.names(""),
        lambda: s3_storage.delete("object"),
    ):
        failing = iter(range(5))
        s3_server.fault = lambda request, left=failing: next(left, None) is not None
        action()
        assert next(failing, None) is None
    s3_server.fault = None
    assert s3_storage.names("") == []


@pytest.mark.usefixtures("impatient")
def test_pairs_are_identical_on_a_server_that_fails_one_request_in_twenty(
    pool: LocalPool,
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_server: S3Server,
    s3_storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is lost, no object is half-written, and no run has to be repeated."""
    chance = random.Random(0)
    failed: list[str] = []

    def fault(request: dict[str, Any]) -> bool:
        if chance.random() < 0.05:
            failed.append(request["REQUEST_METHOD"])
            return True
        return False

    monkeypatch.setattr(pool.host, "storage", s3_storage)
    s3_server.fault = fault
    for _ in range(3):
        ensure_pairs(s3_storage, [spec], pool, wait=False, announce=lambda sentence: None)
    s3_server.fault = None
    assert failed
    assert _files(s3_storage, spec) == expected


MAKER = """
import sys
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pairs.spec import PairSpec
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
import json

storage = Storage.at(sys.argv[1])
content = json.loads(sys.argv[2])
spec = PairSpec.from_dict(content, content["count"])
pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=storage.root)))
print("ready", flush=True)
ensure_pairs(storage, [spec], pool, wait=False, announce=print)
"""


def test_a_second_user_completes_the_killed_run_of_the_first(
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_server: S3Server,
    s3_storage: Storage,
    host_settings: Callable[..., HostSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second run fails at once with --no-wait; otherwise it waits for the dead run's lease and makes the rest."""
    monkeypatch.setattr("orchestrator.lock.LEASE_SECONDS", 4.0)
    maker = MAKER.replace("import sys\n", "import sys\nfrom orchestrator import lock\nlock.LEASE_SECONDS = 4.0\n", 1)
    held, release = threading.Event(), threading.Event()

    def hold_second_shard(request: dict[str, Any]) -> bool:
        if "shard-00001" in request["PATH_INFO"] and request["REQUEST_METHOD"] == "PUT":
            held.set()
            release.wait(60)
            return True
        return False

    s3_server.fault = hold_second_shard
    content = json.dumps(dataclasses.asdict(spec))
    process = subprocess.Popen([sys.executable, "-c", maker, s3_storage.root, content], stdout=subprocess.PIPE)
    pool = LocalPool(Host(host_settings(s3_storage)))
    notes: list[str] = []
    try:
        assert held.wait(120)
        store = PairStore(s3_storage, spec)
        assert list(_files(s3_storage, spec)) == ["shard-00000.parquet"]
        with pytest.raises(BusyStoreError, match=rf"is in use by .* \(process {process.pid}\) since .*--no-wait"):
            ensure_pairs(s3_storage, [spec], pool, wait=False, announce=notes.append)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        release.set()
        process.kill()
        process.communicate()
    s3_server.fault = None
    assert not store.is_complete()
    ensure_pairs(s3_storage, [spec], pool, wait=True, announce=notes.append)
    (sentence,) = notes
    assert f"(process {process.pid}) since " in sentence
    assert "or for its lease of 4 s to lapse" in sentence
    assert _files(s3_storage, spec) == expected


def test_two_simultaneous_runs_make_one_store(
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_storage: Storage,
    host_settings: Callable[..., HostSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second run waits until the first is done, and then has nothing left to make."""
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.05)
    notes: dict[str, list[str]] = {"first": [], "second": []}
    pools = {name: LocalPool(Host(host_settings(s3_storage))) for name in notes}
    key = f"{PairStore(s3_storage, spec).folder}/.lock"
    threads = [
        threading.Thread(
            target=ensure_pairs,
            args=(s3_storage, [spec], pools[name]),
            kwargs={"wait": True, "announce": notes[name].append},
        )
        for name in notes
    ]
    with exclusive(s3_storage, key, wait=False, announce=lambda sentence: None):
        for thread in threads:
            thread.start()
        _until(lambda: all(notes.values()))
    for thread in threads:
        thread.join()
    assert all("is in use by" in sentence for sentences in notes.values() for sentence in sentences)
    assert _files(s3_storage, spec) == expected
    assert not s3_storage.exists(key)
