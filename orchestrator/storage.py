"""Objects under a storage root, on any pyarrow filesystem, read and written as a whole.

The root is a path or a URI (``file://``, ``s3://``, ``gs://``). Writes are atomic: a reader sees a complete object or
none.
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
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator.errors import ConfigError, StoreError, UnreachableStorageError
from orchestrator.files import absolute
from orchestrator.uris import shown

T = TypeVar("T")

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""The beginning of a root that is a URI, not a path."""

LEFTOVER = re.compile(r"\.[^.].*\.[0-9a-f]{32}")
"""Temporary names of files that are renamed once written. Lock files, which their owner manages, have two dots."""

ATTEMPTS = 4
"""Attempts at one operation on remote storage. The client libraries retry by themselves only for some errors."""

FIRST_PAUSE = 0.2
"""Seconds before the second attempt; each further pause is three times as long."""

HOPELESS = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH")
"""Errors of object stores that a retry does not fix."""

NO_NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a directory that follow from the name: a file in place of a folder, say, or a name that is too long."""

JSON_BYTES = 64 * 2**20
"""Size limit for JSON objects, above any that is written here; larger objects are rejected unread."""


class StoredFile(NamedTuple):
    """A file in a storage: its key, its bytes, and when it was written (None if unknown)."""

    key: str
    size: int
    modified: datetime | None


@dataclass(frozen=True)
class Storage:
    """A storage root. Cheap to create and to send to other processes; connects on first use.

    Attributes:
        root: Absolute path or URI.
    """

    root: str

    @classmethod
    def at(cls, root: str | Path) -> Storage:
        """The storage at ``root``; a relative path is resolved here, against the working directory.

        The characters of a path mean themselves; those of a URI may be percent-encoded.

        Raises:
            ConfigError: pyarrow does not support the URI scheme, or ``root`` is not a path.
        """
        text = local_root(str(root)) or str(root)
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
        if not URI.match(self.root):
            return pafs.LocalFileSystem(), self.root
        filesystem, base = pafs.FileSystem.from_uri(self.root)
        if filesystem.type_name in ("s3", "gcs") and not base:
            raise ValueError("it names no bucket")
        return filesystem, base

    def check_exists(self) -> None:
        """Check that a folder on this machine exists. A bucket's prefix needs no object to exist.

        Raises:
            StoreError: The folder does not exist; its path is probably mistyped.
        """
        if self.is_local and not os.path.isdir(self._located[1]):
            raise StoreError(f"no storage at {self.shown}: the folder does not exist; check the path")

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._located[0]

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory on this machine (which may be a shared mount)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, key: str) -> str:
        """The path of ``key`` on the filesystem; the root itself for an empty key.

        Raises:
            StoreError: ``key`` is not a valid name, or it leads out of the root, by itself or through a link.
        """
        normal = posixpath.normpath(key) if key else "."
        if normal.startswith(("/", "..")):
            raise StoreError(f"{key!r} leads out of the storage root {self.shown}")
        if "\0" in normal or any("\ud800" <= character <= "\udfff" for character in normal):
            raise StoreError(f"{key!r} is not a valid file name under {self.shown}")
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
        """The root for display: a URI without its credentials and connection options."""
        return self.root if self.is_local else shown(self.root)

    def __repr__(self) -> str:
        return f"Storage({shown(self.root)!r})"

    def location(self, key: str) -> str:
        """``key`` for display: a path, or a URI without credentials (see :attr:`shown`)."""
        return self.path(key) if self.is_local else f"{self.shown.rstrip('/')}/{key}"

    def _persistently(self, what: str, action: Callable[[], T]) -> T:
        """Run ``action``, with retries after pauses on remote storage; on a directory errors are not transient.

        Raises:
            UnreachableStorageError: Every attempt failed, or the error is permanent.
            FileNotFoundError: Raised by ``action``.
        """
        if self.is_local:
            try:
                return action()
            except OSError as error:
                if error.errno in NO_NAME or str(error).endswith("is a directory"):  # pyarrow's error has no errno
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
        """Read the whole object.

        Args:
            key: Its name.
            limit: Bytes; a larger object is rejected unread.

        Raises:
            FileNotFoundError: The object does not exist.
            StoreError: The object is larger than ``limit``.
        """
        path = self.path(key)
        if limit is not None and (size := self._info(key).size or 0) > limit:
            raise StoreError(f"{self.location(key)} has {size:,} bytes, and at most {limit:,} are expected")

        def action() -> bytes:
            with self.filesystem.open_input_stream(path) as stream:
                return stream.read()

        return self._persistently(f"read {key}", action)

    def write(self, key: str, data: bytes | pa.Buffer) -> None:
        """Write the whole object atomically, replacing any object of that name.

        On a directory the file is written under a temporary name in the same folder, synced and renamed. On an object
        store it is a single put, which is atomic. Nothing is streamed to a final name, since a stream that breaks off
        would be published.

        Raises:
            StoreError: The device is full; no partial file remains.
        """
        path = self.path(key)
        if path == self._located[1]:
            raise StoreError(f"{key!r} does not name an object under {self.shown}")
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
        """Write, read and delete a probe, so that unusable storage is detected before any work starts.

        Raises:
            ConfigError: The storage cannot be used; the message names the root and the reason.
        """
        probe, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
        try:
            self.write(probe, content)
            returned = self.read(probe)
            self.delete(probe)
        except (OSError, pa.ArrowException, StoreError) as error:
            reason = error.__cause__ or error
            raise ConfigError(
                f"storage root {self.shown} cannot be written: {reason}; choose another --storage"
            ) from error
        if returned != content:
            raise ConfigError(f"storage root {self.shown} returns other bytes than were written; choose another")

    def delete(self, key: str) -> None:
        """Remove the object if it exists. A folder is not removed."""
        path = self.path(key)

        def action() -> None:
            # Checked at each attempt: an earlier one may have deleted the object although it failed to answer.
            if self.filesystem.get_file_info(path).type == pafs.FileType.File:
                self.filesystem.delete_file(path)

        self._persistently(f"delete {key}", action)

    def names(self, folder: str) -> list[str]:
        """Names of complete objects and folders directly under ``folder``, sorted; empty if it does not exist."""
        return sorted(info.base_name for info in self._listed(folder) if info.base_name[0] != ".")

    def _listed(self, folder: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return self._persistently(f"list {folder or 'the root'}", lambda: self.filesystem.get_file_info(selector))

    def tree(self, folder: str) -> dict[str, list[StoredFile]]:
        """All files below ``folder``, by the name of the file or folder directly under it that they belong to."""
        base = self.path(folder)
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=True)
        infos = self._persistently(f"list {folder}", lambda: self.filesystem.get_file_info(selector))
        files: dict[str, list[StoredFile]] = {}
        for info in sorted(infos, key=lambda info: info.path):
            if info.type == pafs.FileType.File:
                relative = posixpath.relpath(info.path, base)
                file = StoredFile(f"{folder}/{relative}", info.size or 0, info.mtime)
                files.setdefault(relative.partition("/")[0], []).append(file)
        return files

    def is_folder(self, key: str) -> bool:
        return self._info(key).type == pafs.FileType.Directory

    def delete_tree(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        if not self.is_folder(key):
            self.delete(key)
            return
        path = self.path(key)
        self._persistently(f"delete {key}", lambda: self.filesystem.delete_dir(path))

    def delete_empty_folder(self, folder: str) -> None:
        """Remove a local folder if it is empty; object stores have no folders to remove."""
        if self.is_local:
            with suppress(OSError):  # the folder does not exist or is not empty
                Path(self.path(folder)).rmdir()

    def delete_leftovers(self, folder: str) -> int:
        """Delete temporary files that killed writers left directly under ``folder``; return their number.

        The caller must be the only writer to the folder: the temporary file of an active writer looks the same.
        """
        names = [info.base_name for info in self._listed(folder) if LEFTOVER.fullmatch(info.base_name)]
        for name in names:
            self.delete(posixpath.join(folder, name))
        return len(names)

    def read_json(self, key: str) -> Any:
        """Read an object as JSON.

        Raises:
            FileNotFoundError: The object does not exist.
            ValueError: It is not JSON, or nested too deeply to be parsed.
            StoreError: It is larger than :data:`JSON_BYTES`.
        """
        try:
            return json.loads(self.read(key, JSON_BYTES))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write_json(self, key: str, value: Any) -> None:
        """Write ``value`` as canonical JSON: equal values give equal bytes."""
        self.write(key, canonical_json(value).encode())


def local_root(root: str) -> str | None:
    """The absolute path of a storage root that is a directory; None for a URI of another kind.

    Raises:
        ConfigError: The root is empty, or no directory can have this path.
    """
    if root.lower().startswith("file:"):
        root = unquote(urlsplit(root).path)
    if URI.match(root):
        return None
    try:
        return absolute(root)
    except ValueError as error:
        raise ConfigError(f"storage root {error}") from None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without NaN, so that equal values give equal text and equal hashes."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"


def digest_of(value: Any) -> str:
    """First 16 hex digits of the sha256 of a value's canonical JSON, used to name things that depend on it."""
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
