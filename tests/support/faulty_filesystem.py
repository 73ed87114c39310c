"""An in-memory object store whose operations fail before, during or after they take effect."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs


class FaultyFileSystem(pafs.FileSystemHandler):
    """Complete objects by name, as on S3: an upload becomes visible when it is closed, and never if a part failed.

    Attributes:
        objects: Stored bytes by path.
        rate: Share of operations that fail.
        room: Capacity in bytes, or None.
        operations, injected: Number of operations and of injected failures, by operation.

    """

    def __init__(self, rate: float = 0.0, seed: int = 0, room: int | None = None):
        self.objects: dict[str, bytes] = {}
        self.rate, self.room = rate, room
        self.operations: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def fails(self, operation: str) -> bool:
        """Count this operation and decide whether it fails."""
        with self._lock:
            self.operations[operation] += 1
            failing = self._chance.random() < self.rate
            self.injected[operation] += failing
            return failing

    def check(self, operation: str) -> None:
        if self.fails(operation):
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({operation}, injected)")

    def commit(self, path: str, data: bytes) -> None:
        with self._lock:
            others = sum(len(stored) for name, stored in self.objects.items() if name != path)
            if self.room is not None and others + len(data) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.objects[path] = data

    # ---- pyarrow's filesystem handler ---------------------------------------------------------------------------

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self.check("look")
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        if path in self.objects:
            return pafs.FileInfo(path, pafs.FileType.File, size=len(self.objects[path]))
        folder = any(name.startswith(f"{path}/") for name in self.objects)
        return pafs.FileInfo(path, pafs.FileType.Directory if folder else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        self.check("list")
        prefix = f"{selector.base_dir.rstrip('/')}/"
        names = {name.removeprefix(prefix).partition("/")[0] for name in list(self.objects) if name.startswith(prefix)}
        return [self._info(prefix + name) for name in sorted(names)]

    def delete_file(self, path: str) -> None:
        self.check("delete")
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self.check("delete, its answer lost")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self.check("open")
        if path not in self.objects:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return pa.PythonFile(_Download(self, self.objects[path]), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        self.check("begin an upload")
        return pa.PythonFile(_Upload(self, path), mode="w")

    def _unused(self, *arguments: Any) -> Any:
        raise NotImplementedError("only whole objects are supported")

    open_append_stream = create_dir = delete_dir = delete_dir_contents = _unused
    delete_root_dir_contents = move = copy_file = _unused


class _Download(io.BytesIO):
    def __init__(self, store: FaultyFileSystem, data: bytes):
        super().__init__(data)
        self._store = store

    def read(self, size: int | None = -1) -> bytes:
        self._store.check("read")
        return super().read(size)


class _Upload(io.RawIOBase):
    def __init__(self, store: FaultyFileSystem, path: str):
        self._store, self._path, self._data, self._broken = store, path, bytearray(), False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._store.fails("upload a part"):
            self._broken = True
            raise OSError(errno.EIO, "a part of the upload failed (injected)")
        self._data += memoryview(data)
        return len(memoryview(data))

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self._broken:
            raise OSError(errno.EIO, "the upload was given up")
        self._store.check("end an upload")
        self._store.commit(self._path, bytes(self._data))
        self._store.check("end an upload, its answer lost")
