"""S3, by a server on this machine: objects are whole or not there, also when writers are killed and requests fail."""

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

from orchestrator import storage as storage_module
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import BusyStoreError, ConfigError, UnreachableStorageError
from orchestrator.hosts.host import Host, HostSettings
from orchestrator.lock import exclusive
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage

LARGE = 24 * 2**20
"""More than one part of a multipart upload."""


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
    """Pauses between attempts are short here."""
    monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.01)


def _files(storage: Storage, spec: PairSpec) -> dict[str, bytes]:
    store = PairStore(storage, spec)
    return {name: storage.read(f"{store.folder}/{name}") for name in storage.names(store.folder)}


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened in 60 seconds"
        time.sleep(0.01)


def test_a_root_is_listed_and_shown_without_its_connection(s3_storage: Storage) -> None:
    """The endpoint and any credentials of the URI are no part of where an object is."""
    s3_storage.write("folder/object", b"data")
    s3_storage.write("object", b"data")
    bucket = s3_storage.root.removeprefix("s3://").partition("/")[0]
    assert s3_storage.names("") == ["folder", "object"]
    assert s3_storage.location("folder/object") == f"s3://{bucket}/root/folder/object"
    secret = Storage(f"s3://key:secret@{bucket}/root?region=eu-west-1")
    assert secret.shown == f"s3://{bucket}/root"
    assert secret.location("a") == f"s3://{bucket}/root/a"


def test_a_root_may_be_a_whole_bucket(s3_storage: Storage) -> None:
    """No folder in the URI, with or without a slash."""
    for ending in ("", "/"):
        whole = Storage.at(s3_storage.root.replace("/root?", f"{ending}?"))
        whole.write("folder/object", b"data")
        assert whole.read("folder/object") == b"data"
        assert whole.names("folder") == ["object"]
        assert "folder" in whole.names("")
        assert whole.location("folder/object").endswith("/folder/object")
        assert "//folder" not in whole.location("folder/object")


def test_a_bucket_that_is_not_there_is_refused_at_once(s3_server: S3Server) -> None:
    """Asking again would not make it; the message has no credentials in it."""
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
    """SIGKILL between two parts of an upload: no object, or the one that was there before; the next writer succeeds."""
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
def test_an_upload_that_breaks_off_leaves_the_old_object(
    s3_server: S3Server, s3_storage: Storage, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever request of it fails for good: its beginning, a part, or its end."""
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)  # the client library takes seconds for each
    s3_storage.write("object", b"old")
    s3_server.fault = lambda request: request["REQUEST_METHOD"] != "DELETE" and query in request["QUERY_STRING"]
    with pytest.raises(
        UnreachableStorageError, match=r"failed to write object \(1 attempts\): .*run the same command again"
    ):
        s3_storage.write("object", b"x" * 1000)
    s3_server.fault = None
    assert s3_storage.read("object") == b"old"


@pytest.mark.usefixtures("impatient")
def test_storage_that_fails_for_a_while_is_asked_again(s3_server: S3Server, s3_storage: Storage) -> None:
    """Five failing requests in a row are more than the client library stands by itself."""
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
def test_pairs_are_the_same_bytes_on_a_server_that_fails_one_request_in_twenty(
    pool: LocalPool,
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_server: S3Server,
    s3_storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is lost, nothing is half there, and nobody has to run it again."""
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
        ensure_pairs(s3_storage, [spec], pool, wait=False, note=lambda sentence: None)
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
spec = PairSpec.from_dict(json.loads(sys.argv[2]))
pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=storage.root)))
print("ready", flush=True)
ensure_pairs(storage, [spec], pool, wait=False, note=print)
"""


def test_a_killed_run_goes_on_and_the_second_user_waits_for_whom(
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_server: S3Server,
    s3_storage: Storage,
    host_settings: Callable[..., HostSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One user's run is killed in the middle; another's fails at once, or waits for the lease and makes the rest."""
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
    told: list[str] = []
    try:
        assert held.wait(120)
        store = PairStore(s3_storage, spec)
        assert list(_files(s3_storage, spec)) == ["shard-00000.parquet"]
        with pytest.raises(BusyStoreError, match=rf"is in use by .* \(process {process.pid}\) since .*--no-wait"):
            ensure_pairs(s3_storage, [spec], pool, wait=False, note=told.append)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        release.set()
        process.kill()
        process.communicate()
    s3_server.fault = None
    assert not store.is_complete()
    ensure_pairs(s3_storage, [spec], pool, wait=True, note=told.append)
    (sentence,) = told
    assert f"(process {process.pid}) since " in sentence
    assert "or for its lease of 4 s to lapse" in sentence
    assert _files(s3_storage, spec) == expected


def test_two_at_once_make_one_store(
    spec: PairSpec,
    expected: dict[str, bytes],
    s3_storage: Storage,
    host_settings: Callable[..., HostSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second waits until the first is done, and then finds everything made."""
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.05)
    told: dict[str, list[str]] = {"first": [], "second": []}
    pools = {name: LocalPool(Host(host_settings(s3_storage))) for name in told}
    key = f"{PairStore(s3_storage, spec).folder}/.lock"
    threads = [
        threading.Thread(
            target=ensure_pairs,
            args=(s3_storage, [spec], pools[name]),
            kwargs={"wait": True, "note": told[name].append},
        )
        for name in told
    ]
    with exclusive(s3_storage, key, wait=False, announce=lambda sentence: None):
        for thread in threads:
            thread.start()
        _until(lambda: all(told.values()))
    for thread in threads:
        thread.join()
    assert all("is in use by" in sentence for sentences in told.values() for sentence in sentences)
    assert _files(s3_storage, spec) == expected
    assert not s3_storage.exists(key)
