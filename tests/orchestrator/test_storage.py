"""Whole objects, written atomically, on a directory or on an object store."""

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
    """A file on a full device: it opens, and takes no byte."""

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


def test_what_is_written_is_read_back_and_replaces_what_was_there(storage: Storage) -> None:
    """A whole object at a time; folders come into being by themselves."""
    storage.write("a/b/object", b"first")
    storage.write("a/b/object", b"second")
    assert storage.exists("a/b/object")
    assert storage.read("a/b/object") == b"second"
    assert storage.names("a") == ["b"]
    assert _leftovers(storage) == ["object"]


def test_a_missing_object_is_said_to_be_missing(storage: Storage) -> None:
    """Reading raises, asking and deleting do not."""
    assert not storage.exists("nothing")
    assert storage.names("nowhere") == []
    storage.delete("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_leaves_nothing_behind_and_keeps_the_old_object(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The message names the file, its size and the remedy; a reader still finds what was complete."""
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


def test_an_interrupted_write_leaves_nothing_behind(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between write and rename: the old object stands, and no temporary file stays."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    storage.write("object", b"old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write("object", b"new")
    assert storage.read("object") == b"old"
    assert _leftovers(storage) == ["object"]


def test_another_error_of_the_device_is_not_called_a_full_disk(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong remedy would be worse than none."""

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        storage.write("object", b"data")
    assert not isinstance(caught.value, StoreError)


def test_an_object_is_seen_complete_or_not_at_all(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename there is nothing under the object's name, also not for a listing."""
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
def test_a_key_that_climbs_out_of_the_root_is_refused(storage: Storage, key: str) -> None:
    """A key comes from a manifest or a name; it must not reach other files."""
    with pytest.raises(StoreError, match=r"leads out of the storage root .*storage"):
        storage.path(key)
    assert storage.path("a/../b") == f"{storage.root}/b"


def test_a_relative_root_is_taken_from_the_working_directory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts and trials run in other directories: the root that they are sent is absolute."""
    monkeypatch.chdir(tmp_path)
    storage = Storage.at("data")
    storage.write("object", b"data")
    monkeypatch.chdir("/")
    assert storage.root == f"{tmp_path}/data"
    assert storage.read("object") == b"data"
    assert storage.location("object") == f"{tmp_path}/data/object"


@pytest.mark.parametrize("folder", ["plain", "with space", "50% #1", "déjà"])
def test_a_path_and_a_file_uri_are_the_same_place(tmp_path: Path, folder: str) -> None:
    """A root may be written either way, whatever its folder is called."""
    root = tmp_path / folder
    storage = Storage.at(root)
    storage.write("object", b"data")
    assert (root / "object").read_bytes() == b"data"
    by_uri = Storage.at(root.as_uri())
    assert by_uri.is_local
    assert by_uri.read("object") == b"data"


@pytest.mark.parametrize("root", ["ftp://host/folder", "nowhere://bucket"])
def test_a_scheme_that_is_not_known_is_refused_with_those_that_are(root: str) -> None:
    """Before any work, not at the first shard."""
    with pytest.raises(ConfigError, match=rf"storage root '{root}' cannot be used: .*; give a path, s3://… or gs://…"):
        Storage.at(root)


def test_an_object_store_is_written_by_whole_objects(object_store: Storage) -> None:
    """On a store without rename there is one put to the final name, and no temporary name is ever seen."""
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


def test_an_object_store_without_space_is_told_alike(object_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same message as on a directory, with the object's address."""
    monkeypatch.setattr(Storage, "filesystem", property(lambda self: _FullStore()))
    with pytest.raises(StoreError, match=r"no space left writing s3://bucket/root/object \(4 bytes\); free some"):
        object_store.write("object", b"data")


class _FullStore:
    def open_output_stream(self, path: str) -> None:
        _full_disk()


def test_equal_values_have_equal_json() -> None:
    """Digests are taken of it: the order of keys must not matter, and NaN has no place in it."""
    assert canonical_json({"b": 1, "a": [1.5, (2,)]}) == canonical_json({"a": [1.5, [2]], "b": 1})
    assert canonical_json({"a": 1}) != canonical_json({"a": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_json_survives_the_round_trip_to_the_last_bit(storage: Storage) -> None:
    """An optimiser's state goes through it and must come back as it was."""
    value = {"numbers": [0.1, 1 / 3, 1e-300, -0.0, 12345678901234567890], "text": "é"}
    storage.write_json("state.json", value)
    assert storage.read_json("state.json") == value
    assert repr(storage.read_json("state.json")["numbers"]) == repr(value["numbers"])


def test_a_root_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    """A file where a folder is meant; a probe is written and leaves nothing behind."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"root {tmp_path}/file cannot be written: .*; choose another --sto"):
        Storage.at(tmp_path / "file").check_writable()
    Storage.at(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_killed_writer_left_is_found_and_deleted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGKILL between writing and renaming leaves a temporary name; finished objects and locks are not touched."""
    storage.write("folder/object", b"whole")
    storage.write("folder/.lock", b"mine")

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # as a killed process would not
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
    """A folder under a name that is to go is somebody's own."""
    storage.write("folder/mine", b"kept")
    storage.delete("folder")
    assert storage.read("folder/mine") == b"kept"
