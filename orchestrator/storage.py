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
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator.errors import ConfigError, StoreError, UnreachableStorageError

T = TypeVar("T")

LEFTOVER = re.compile(r"\.[^.].*\.[0-9a-f]{32}")
"""Names under which files are written before they are renamed; a lock's begin with two dots, and are its owner's."""

ATTEMPTS = 4
"""At one operation on remote storage. The client libraries ask again themselves, for some errors and not for others."""

FIRST_PAUSE = 0.2
"""Seconds before the second attempt; every further pause is three times as long."""

HOPELESS = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH")
"""Errors of object stores that asking again does not mend."""

NO_NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a directory that follow from the name: a file where a folder is meant, or too long."""

JSON_BYTES = 64 * 2**20
"""Larger than any JSON that is written here: a longer object is not read."""


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
            ConfigError: A URI scheme that pyarrow does not know, or no path at all.
        """
        text = str(root)
        if not text or "\0" in text:
            raise ConfigError(f"storage root {text!r} is no path; give a path, s3://… or gs://…")
        scheme = urlsplit(text).scheme
        if not scheme:
            text = str(Path(text).expanduser().absolute())
        storage = cls(text)
        try:
            _ = storage._located
        except (pa.ArrowException, NotImplementedError, OSError, ValueError) as error:
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
        """The path of ``key`` on the filesystem; the root's own for an empty key.

        Raises:
            StoreError: ``key`` climbs out of the root, or a link under the root leads out of it.
        """
        normal = posixpath.normpath(key) if key else "."
        if normal.startswith(("/", "..")):
            raise StoreError(f"{key!r} leads out of the storage root {self.shown}")
        if "\0" in normal or any("\ud800" <= character <= "\udfff" for character in normal):
            raise StoreError(f"{key!r} can be the name of no file under {self.shown}")
        base = self._located[1]
        path = base if normal == "." else posixpath.join(base, normal)
        if self.is_local:
            real, root = os.path.realpath(path), os.path.realpath(base)
            if os.path.commonpath([real, root]) != root:
                raise StoreError(
                    f"{key!r} leads through a link to {real}, out of the storage root {self.shown}; give --storage the "
                    f"place that the link points to"
                )
        return path

    @property
    def shown(self) -> str:
        """The root as it may be shown: a URI without the credentials and the connection's options it may hold."""
        parts = urlsplit(self.root)
        return self.root if self.is_local else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def location(self, key: str) -> str:
        """``key`` as a user would write it: a path, or a URI (see :attr:`shown`)."""
        return self.path(key) if self.is_local else f"{self.shown.rstrip('/')}/{key}"

    def _persistently(self, what: str, action: Callable[[], T]) -> T:
        """``action``, again after a while where remote storage failed; on a directory errors are not passing.

        Raises:
            UnreachableStorageError: It failed every time, or for a reason that does not pass.
            FileNotFoundError: As the action does.
        """
        if self.is_local:
            try:
                return action()
            except OSError as error:
                if error.errno in NO_NAME or str(error).endswith("is a directory"):  # pyarrow's has no number
                    raise StoreError(f"storage {self.shown} cannot {what}: {error}") from error
                raise
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if _is_full(error):
                    raise
                hopeless = isinstance(error, PermissionError) or HOPELESS.search(str(error))
                if hopeless or attempt == ATTEMPTS - 1:
                    times = "" if hopeless else f" ({ATTEMPTS} attempts)"
                    raise UnreachableStorageError(
                        f"storage {self.shown} failed to {what}{times}: {error}; when it can be used, run the same "
                        f"command again: what is complete is kept"
                    ) from error
            time.sleep(FIRST_PAUSE * 3**attempt)
        raise AssertionError("the loop returns or raises")

    def _info(self, key: str) -> pafs.FileInfo:
        path = self.path(key)
        return self._persistently(f"look for {key}", lambda: self.filesystem.get_file_info(path))

    def exists(self, key: str) -> bool:
        return self._info(key).type != pafs.FileType.NotFound

    def read(self, key: str, limit: int | None = None) -> bytes:
        """The whole object.

        Args:
            key: Its name.
            limit: Bytes; a larger object is refused before any of it is read.

        Raises:
            FileNotFoundError: There is none.
            StoreError: It is larger than ``limit``.
        """
        path = self.path(key)
        if limit is not None and (size := self._info(key).size or 0) > limit:
            raise StoreError(f"{self.location(key)} has {size:,} bytes, and at most {limit:,} can be its own")

        def action() -> bytes:
            with self.filesystem.open_input_stream(path) as stream:
                return stream.read()

        return self._persistently(f"read {key}", action)

    def write(self, key: str, data: bytes | pa.Buffer) -> None:
        """Write the whole object atomically, replacing what was there.

        On a directory: a temporary name beside the target, fsync, rename. On an object store one put, which is
        atomic by itself; nothing is ever streamed to a final name, since a stream that breaks off would be published.

        Raises:
            StoreError: The device is full; nothing was left behind.
        """
        path = self.path(key)
        if path == self._located[1]:
            raise StoreError(f"{key!r} names no object under {self.shown}")
        try:
            put = _write_local if self.is_local else self._put
            self._persistently(f"write {key}", lambda: put(path, data))
        except OSError as error:
            if _is_full(error):
                raise StoreError(
                    f"no space left writing {self.location(key)} ({len(memoryview(data)):,} bytes); free some or point "
                    f"--storage elsewhere, then run the same command again: what is complete is kept"
                ) from error
            raise

    def _put(self, path: str, data: bytes | pa.Buffer) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

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
        except (OSError, pa.ArrowException, StoreError) as error:
            reason = error.__cause__ or error
            raise ConfigError(
                f"storage root {self.shown} cannot be written: {reason}; choose another --storage"
            ) from error
        if found != content:
            raise ConfigError(f"storage root {self.shown} gives back other bytes than were written; choose another")

    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none. A folder is left alone."""
        path = self.path(key)

        def action() -> None:
            # Asked each time: what failed to answer may have been deleted.
            if self.filesystem.get_file_info(path).type == pafs.FileType.File:
                self.filesystem.delete_file(path)

        self._persistently(f"delete {key}", action)

    def names(self, folder: str) -> list[str]:
        """Names of the finished objects and folders directly under ``folder``, sorted; empty where there is none."""
        return sorted(info.base_name for info in self._listed(folder) if info.base_name[0] != ".")

    def _listed(self, folder: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return self._persistently(f"list {folder or 'the root'}", lambda: self.filesystem.get_file_info(selector))

    def delete_empty_folder(self, folder: str) -> None:
        """Remove a folder of a directory in which nothing is left; on an object store there is none to remove."""
        if self.is_local:
            with suppress(OSError):  # not there, or somebody has put something into it
                Path(self.path(folder)).rmdir()

    def delete_leftovers(self, folder: str) -> int:
        """Delete what writers that were killed left half-written directly under ``folder``; how many there were.

        Only for whoever has the folder to itself: a writer's own temporary name looks the same.
        """
        found = [info.base_name for info in self._listed(folder) if LEFTOVER.fullmatch(info.base_name)]
        for name in found:
            self.delete(posixpath.join(folder, name))
        return len(found)

    def read_json(self, key: str) -> Any:
        """The value of a JSON object.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not JSON, or nested more deeply than can be read.
            StoreError: It is larger than any that is written here.
        """
        try:
            return json.loads(self.read(key, JSON_BYTES))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write_json(self, key: str, value: Any) -> None:
        """``value`` as canonical JSON: the same value gives the same bytes."""
        self.write(key, canonical_json(value).encode())


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no NaN: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON, 16 hex digits: a name for whatever depends on it."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_local(name: str, data: bytes | pa.Buffer) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(memoryview(data))
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
