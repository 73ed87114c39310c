"""Files under a storage root, on any pyarrow filesystem: whole objects, written atomically, nothing else.

The root is a path or a URI (``file://``, ``s3://``, ``gs://``). A reader sees an object complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator.errors import ConfigError, StoreError

LEFTOVER = re.compile(r"\.[^.].*\.[0-9a-f]{32}")
"""Names under which files are written before they are renamed; a lock's begin with two dots, and are its owner's."""


@dataclass(frozen=True)
class Storage:
    """A storage root. Cheap to make and to send to other processes; connects on first use.

    Attributes:
        root: Absolute path or URI.
    """

    root: str

    @classmethod
    def at(cls, root: str | Path) -> Storage:
        """The storage at ``root``; a relative path is taken from the working directory, once, here.

        Raises:
            ConfigError: A URI scheme that pyarrow does not know.
        """
        text = str(root)
        scheme = urlsplit(text).scheme
        if not scheme:
            text = str(Path(text).expanduser().absolute())
        storage = cls(text)
        try:
            _ = storage._located
        except (pa.ArrowInvalid, NotImplementedError) as error:
            raise ConfigError(
                f"storage root {text!r} cannot be used: {error}; give a path, s3://… or gs://…"
            ) from error
        return storage

    @cached_property
    def _located(self) -> tuple[pafs.FileSystem, str]:
        filesystem, base = pafs.FileSystem.from_uri(self.root)
        return filesystem, base

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._located[0]

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory of this machine (which may be a shared mount)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, key: str) -> str:
        """The path of ``key`` on the filesystem.

        Raises:
            StoreError: ``key`` climbs out of the root.
        """
        normal = posixpath.normpath(key)
        if normal.startswith(("/", "..")):
            raise StoreError(f"{key!r} leads out of the storage root {self.root}")
        return posixpath.join(self._located[1], normal)

    @property
    def shown(self) -> str:
        """The root as it may be shown: a URI without the credentials and the connection's options it may hold."""
        parts = urlsplit(self.root)
        return self.root if self.is_local else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def location(self, key: str) -> str:
        """``key`` as a user would write it: a path, or a URI (see :attr:`shown`)."""
        return self.path(key) if self.is_local else f"{self.shown.rstrip('/')}/{key}"

    def exists(self, key: str) -> bool:
        return self.filesystem.get_file_info(self.path(key)).type != pafs.FileType.NotFound

    def read(self, key: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: There is none.
        """
        with self.filesystem.open_input_stream(self.path(key)) as stream:
            return stream.read()

    def write(self, key: str, data: bytes | pa.Buffer) -> None:
        """Write the whole object atomically, replacing what was there.

        On a directory: a temporary name beside the target, fsync, rename. On an object store one put, which is
        atomic by itself; nothing is ever streamed to a final name, since a stream that breaks off would be published.

        Raises:
            StoreError: The device is full; nothing was left behind.
        """
        path = self.path(key)
        try:
            if self.is_local:
                _write_local(Path(path), memoryview(data))
            else:
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"no space left writing {self.location(key)} ({len(memoryview(data)):,} bytes); free some or point "
                    f"--storage elsewhere, then run the same command again: what is complete is kept"
                ) from error
            raise

    def check_writable(self) -> None:
        """Write, read and delete a probe: a storage that cannot be used is found before any work starts.

        Raises:
            ConfigError: Naming the root, and why.
        """
        probe, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
        try:
            self.write(probe, content)
            found = self.read(probe)
            self.delete(probe)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"storage root {self.shown} cannot be written: {error}; choose another --storage"
            ) from error
        if found != content:
            raise ConfigError(f"storage root {self.shown} gives back other bytes than were written; choose another")

    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none. A folder is left alone."""
        if self.filesystem.get_file_info(self.path(key)).type == pafs.FileType.File:
            self.filesystem.delete_file(self.path(key))

    def names(self, folder: str) -> list[str]:
        """Names of the finished objects and folders directly under ``folder``, sorted; empty where there is none."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector) if info.base_name[0] != ".")

    def delete_leftovers(self, folder: str) -> int:
        """Delete what writers that were killed left half-written directly under ``folder``; how many there were.

        Only for whoever has the folder to itself: a writer's own temporary name looks the same.
        """
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        found = [i.path for i in self.filesystem.get_file_info(selector) if LEFTOVER.fullmatch(i.base_name)]
        for path in found:
            self.filesystem.delete_file(path)
        return len(found)

    def read_json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def write_json(self, key: str, value: Any) -> None:
        """``value`` as canonical JSON: the same value gives the same bytes."""
        self.write(key, canonical_json(value).encode())


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no NaN: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON, 16 hex digits: a name for whatever depends on it."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def _write_local(path: Path, data: memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a crash
    finally:
        os.close(directory)
