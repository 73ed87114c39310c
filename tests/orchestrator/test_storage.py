"""Complete objects, written atomically to a directory or to an object store."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, StoreError
from orchestrator.storage import Storage, canonical_json


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullFile:
    """A file on a full device: it opens, but every write fails."""

    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        _full_disk()


def _leftovers(storage: Storage) -> list[str]:
    return sorted(path.name for path in Path(storage.root).rglob("*") if path.is_file())


def test_a_write_is_read_back_and_replaces_the_old_object(storage: Storage) -> None:
    """Writes replace the complete object and create missing folders."""
    storage.write("a/b/object", b"first")
    storage.write("a/b/object", b"second")
    assert storage.exists("a/b/object")
    assert storage.read("a/b/object") == b"second"
    assert storage.names("a") == ["b"]
    assert _leftovers(storage) == ["object"]


def test_reading_a_missing_object_raises(storage: Storage) -> None:
    """Checking for it, listing and deleting do not raise."""
    assert not storage.exists("nothing")
    assert storage.names("nowhere") == []
    storage.delete("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_leaves_nothing_behind_and_keeps_the_old_object(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The message names the file, its size and the remedy; readers still see the old object."""
    storage.write("shard", b"complete")
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", _full_disk)
    else:
        real = open
        monkeypatch.setattr("builtins.open", lambda path, mode="r", **kw: _FullFile(real(path, mode, **kw)))
    with pytest.raises(StoreError) as caught:
        storage.write("shard", b"x" * 12345)
    monkeypatch.undo()
    assert f"no space left writing {storage.root}/shard (12,345 bytes)" in str(caught.value)
    assert "free some or point --storage elsewhere, then run the same command again" in str(caught.value)
    assert _leftovers(storage) == ["shard"]
    assert storage.read("shard") == b"complete"


def test_an_interrupted_write_leaves_no_temporary_file(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C between write and rename, only the old object is there."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    storage.write("object", b"old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write("object", b"new")
    assert storage.read("object") == b"old"
    assert _leftovers(storage) == ["object"]


def test_other_device_errors_are_not_reported_as_a_full_disk(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong remedy would be worse than none."""

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        storage.write("object", b"data")
    assert not isinstance(caught.value, StoreError)


def test_an_object_is_visible_only_when_complete(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, neither ``exists`` nor a listing shows the object."""
    seen = []
    real = os.replace

    def look_first(source: Any, target: Any) -> None:
        seen.append((storage.exists("object"), storage.names("")))
        real(source, target)

    monkeypatch.setattr(os, "replace", look_first)
    storage.write("object", b"data")
    assert seen == [(False, [])]
    assert storage.names("") == ["object"]


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", ".."])
def test_a_key_that_leads_out_of_the_root_is_refused(storage: Storage, key: str) -> None:
    """Keys come from manifests and names; they must not reach other files."""
    with pytest.raises(StoreError, match=r"leads out of the storage root .*storage"):
        storage.path(key)
    assert storage.path("a/../b") == f"{storage.root}/b"


def test_a_relative_root_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts and trials run in other directories, so they need an absolute root."""
    monkeypatch.chdir(tmp_path)
    storage = Storage.at("data")
    storage.write("object", b"data")
    monkeypatch.chdir("/")
    assert storage.root == f"{tmp_path}/data"
    assert storage.read("object") == b"data"
    assert storage.location("object") == f"{tmp_path}/data/object"


@pytest.mark.parametrize("folder", ["plain", "with space", "50% #1", "déjà"])
def test_a_path_and_its_file_uri_are_the_same_root(tmp_path: Path, folder: str) -> None:
    """This holds for folder names with spaces, special characters and accents."""
    root = tmp_path / folder
    storage = Storage.at(root)
    storage.write("object", b"data")
    assert (root / "object").read_bytes() == b"data"
    by_uri = Storage.at(root.as_uri())
    assert by_uri.is_local
    assert by_uri.read("object") == b"data"


@pytest.mark.parametrize("root", ["ftp://host/folder", "nowhere://bucket"])
def test_the_error_for_an_unknown_scheme_names_the_supported_ones(root: str) -> None:
    """It is raised before any work, not at the first shard."""
    with pytest.raises(ConfigError, match=rf"storage root '{root}' cannot be used: .*; give a path, s3://… or gs://…"):
        Storage.at(root)


@pytest.mark.parametrize("root", ["s3://", "gs://"])
def test_a_uri_without_a_bucket_is_refused(root: str) -> None:
    """Otherwise the first folder under the root would be taken for the bucket."""
    with pytest.raises(
        ConfigError, match=rf"storage root '{root}' cannot be used: it names no bucket; give a path, s3:"
    ):
        Storage.at(root)


def test_objects_are_put_whole_on_an_object_store(object_store: Storage) -> None:
    """Without rename, an object is put once under its final name, and no temporary name is visible."""
    object_store.write("a/b/object", b"first")
    object_store.write("a/b/object", b"second")
    assert not object_store.is_local
    assert object_store.read("a/b/object") == b"second"
    assert object_store.names("a/b") == ["object"]
    assert object_store.names("nowhere") == []
    assert object_store.location("a/b/object") == "s3://bucket/root/a/b/object"
    object_store.delete("a/b/object")
    assert not object_store.exists("a/b/object")
    with pytest.raises(FileNotFoundError):
        object_store.read("a/b/object")


def test_a_full_object_store_gives_the_same_error_as_a_full_disk(
    object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the address of the object."""
    monkeypatch.setattr(Storage, "filesystem", property(lambda self: _FullStore()))
    with pytest.raises(StoreError, match=r"no space left writing s3://bucket/root/object \(4 bytes\); free some"):
        object_store.write("object", b"data")


class _FullStore:
    def open_output_stream(self, path: str) -> None:
        _full_disk()


def test_equal_values_have_equal_json() -> None:
    """Digests are computed from it: the order of keys must not matter, and NaN is refused."""
    assert canonical_json({"b": 1, "a": [1.5, (2,)]}) == canonical_json({"a": [1.5, [2]], "b": 1})
    assert canonical_json({"a": 1}) != canonical_json({"a": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_json_round_trips_are_exact(storage: Storage) -> None:
    """The state of an optimiser is stored as JSON and must be restored bit for bit."""
    value = {"numbers": [0.1, 1 / 3, 1e-300, -0.0, 12345678901234567890], "text": "é"}
    storage.write_json("state.json", value)
    assert storage.read_json("state.json") == value
    assert repr(storage.read_json("state.json")["numbers"]) == repr(value["numbers"])


def test_a_root_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    """For example a file in place of a folder. The probe object leaves nothing behind."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"root {tmp_path}/file cannot be written: .*; choose another --sto"):
        Storage.at(tmp_path / "file").check_writable()
    Storage.at(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


def test_leftovers_of_a_killed_writer_are_deleted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL between write and rename leaves a temporary file; finished objects and locks are not touched."""
    storage.write("folder/object", b"whole")
    storage.write("folder/.lock", b"mine")

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a killed process does not clean up
    with pytest.raises(KeyboardInterrupt):
        storage.write("folder/other", b"half")
    with pytest.raises(KeyboardInterrupt):
        storage.write("folder/.lock", b"half a lease")
    monkeypatch.undo()
    folder = Path(storage.path("folder"))
    assert len(list(folder.iterdir())) == 4
    assert storage.delete_leftovers("folder") == 1
    assert storage.names("folder") == ["object"]
    assert len(list(folder.iterdir())) == 3


def test_deleting_leaves_folders_alone(storage: Storage) -> None:
    """A folder with the name of the key may belong to a user."""
    storage.write("folder/mine", b"kept")
    storage.delete("folder")
    assert storage.read("folder/mine") == b"kept"
