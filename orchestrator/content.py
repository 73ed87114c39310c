"""Digests of content that decides numbers: values, files, source code and networks.

Stored pairs, results and measurements are found again by such digests. A digest does not depend on where a file lies or
on when it was written.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import pickletools
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.errors import ConfigError
from orchestrator.files import data_files

PRODUCT = tuple(Path(__file__).parents[1] / name for name in ("orchestrator", "solvers", "sweeps"))
"""The product's own packages. Their code is not part of any digest: format numbers stand for it."""

_DEPENDENCIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_INSTALLED = {"site-packages", "dist-packages"}


def digest(*parts: Any) -> str:
    """sha256 of a sequence of parts, in hexadecimal.

    Args:
        parts: Paths of files and folders (by content), bytes, arrays, tensors, and values that JSON can represent.
    """
    total = hashlib.sha256()
    for part in parts:
        total.update(_part(part).encode() + b"\n")
    return total.hexdigest()


def _part(part: Any) -> str:
    if isinstance(part, Path):
        return f"folder {_folder_digest(part)}" if part.is_dir() else f"file {file_digest(part)}"
    if isinstance(part, bytes):
        return f"bytes {hashlib.sha256(part).hexdigest()}"
    if isinstance(part, torch.Tensor):
        data: npt.NDArray[Any] = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"tensor {part.dtype} {tuple(part.shape)} {hashlib.sha256(data.data).hexdigest()}"
    if isinstance(part, np.ndarray):
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        return f"array {part.dtype} {part.shape} {hashlib.sha256(data.data).hexdigest()}"
    return f"value {json.dumps(part, sort_keys=True)}"


def with_content(value: Any) -> Any:
    """A value of a configuration in which paths of files and folders are replaced by digests of their content.

    A text is a path if it has a separator and something lies there.
    """
    if isinstance(value, Mapping):
        return {key: with_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_content(item) for item in value]
    if isinstance(value, str) and "/" in value and "\0" not in value and (path := Path(value).expanduser()).exists():
        return {"content": digest(path)}
    return value


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes. A process reads a file again only if its size, times or inode have changed."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@functools.cache
def _file_digest(path: Path, *status: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    files = data_files(folder, [""])
    return digest(*([path.relative_to(folder).as_posix(), file_digest(path)] for path in files))


# ---- source code ------------------------------------------------------------------------------------------------


def source_digest(*modules: str) -> str:
    """sha256 of the code of modules, and of all the user's own modules that they import, directly or not.

    The user's own are those that are neither in the standard library, nor installed as a package, nor part of this
    product. Imports are read from the source, within functions as well, so the digest is the same whether or not the
    modules are loaded. For a module of an installed package, its version stands for what it imports.

    Raises:
        ConfigError: A module has no source file, or its file has changed since this process loaded it.
    """
    parts: list[Any] = []
    for name in modules:
        file = _file_of(_spec_of(name))
        if file is None:
            raise ConfigError(f"module {name!r} has no source file to identify its version by; put its code in a file")
        if _INSTALLED & {*file.parts}:
            parts.append([name, file_digest(file), _version(name)])
    return digest([*modules], parts, own_code(modules))


def own_code(modules: Iterable[str]) -> list[tuple[str, str]]:
    """Names and digests of the user's own modules among ``modules`` and everything that these import.

    Raises:
        ConfigError: A file has changed since this process loaded it.
    """
    return [(name, _unchanged(name, file)) for name, file in own_modules(modules).items()]


def own_modules(modules: Iterable[str]) -> dict[str, Path]:
    """Files of the user's own modules among ``modules`` and everything that these import, by name, sorted."""
    importlib.invalidate_caches()
    files: dict[str, Path] = {}
    waiting, seen = list(modules), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        package, _, _ = name.rpartition(".")
        waiting += [package] if package else []
        spec = _spec_of(name)
        file = _file_of(spec)
        if spec is None or file is None or not is_own(file):
            continue
        files[name] = file
        if file.suffix == ".py":
            waiting += imports(file.read_bytes(), spec.parent or "")
    return dict(sorted(files.items()))


def imports(source: bytes | str, package: str) -> list[str]:
    """Names of the modules that Python code may import; names of what is imported from a module are among them.

    Args:
        source: The code. What is not Python imports nothing.
        package: The package that relative imports start from.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = _absolute("." * node.level + (node.module or ""), package)
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
            case ast.Call(ast.Name(function) | ast.Attribute(attr=function), [ast.Constant(str(name)), *_]):
                if function in ("import_module", "__import__") and (base := _absolute(name, package)):
                    names.append(base)
    return names


def _absolute(name: str, package: str) -> str | None:
    try:
        return importlib.util.resolve_name(name, package)
    except ImportError:  # a relative import outside of a package fails when it runs, too
        return None


def pickled_modules(path: Path) -> list[str]:
    """Names of the modules that a pickle refers to, or that source code within it imports; nothing of it is run.

    Published EDM networks hold the code of their classes.
    """
    with path.open("rb") as stream:
        names = list(_pickled_names(stream))
    return [module for name in names for module in (name[:1] if isinstance(name, tuple) else imports(name, ""))]


def pickled_globals(path: Path) -> list[tuple[str, str]]:
    """Modules and names of the classes and functions that a pickle or a file of ``torch.save`` refers to, each once.

    Raises:
        ValueError: The file is neither.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            streams = [io.BytesIO(archive.read(name)) for name in pickles]
        names = [name for stream in streams for name in _pickled_names(stream)]
    else:
        with path.open("rb") as stream:
            names = list(_pickled_names(stream))
            if not names:  # old files of torch.save begin with three small pickles: a number, a version and sizes
                for _ in range(3):
                    names += _pickled_names(stream)
    return list(dict.fromkeys(name for name in names if isinstance(name, tuple)))


def _pickled_names(stream: IO[bytes]) -> Iterator[tuple[str, str] | str]:
    """What a pickle refers to, as (module, name), and texts in it that may be source code with imports."""
    memo: dict[int, str] = {}
    recent: list[str] = ["", ""]  # the texts that the last operations pushed; "" for anything else
    for opcode, argument, _ in pickletools.genops(stream):
        value: Any = argument
        match opcode.name:
            case "MEMOIZE":
                memo[len(memo)] = recent[-1]
                continue
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(value)] = recent[-1]
                continue
            case "GET" | "BINGET" | "LONG_BINGET":
                value = memo.get(int(value), "")
            case "GLOBAL" | "INST":
                module, _, name = str(value).partition(" ")
                yield module, name
                value = ""
            case "STACK_GLOBAL":
                yield recent[-2], recent[-1]
                value = ""
            case _ if isinstance(value, str) and "import " in value:
                yield value
        recent = [recent[-1], value if isinstance(value, str) else ""]


def _spec_of(name: str) -> ModuleSpec | None:
    """Where a module would be imported from. Unlike ``find_spec`` of importlib, this does not import its package."""
    path: Any = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count])
        finders = (finder.find_spec(prefix, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in finders if spec is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and count < len(parts):
            return None
    return spec


def _file_of(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def is_own(file: Path) -> bool:
    """Whether code in this file is the user's own: neither in the standard library, nor installed, nor the product."""
    resolved = file.resolve()
    if _INSTALLED & {*file.parts, *resolved.parts}:
        return False
    return not any(resolved.is_relative_to(folder) for folder in (*_DEPENDENCIES, *map(Path.resolve, PRODUCT)))


def is_own_module(name: str) -> bool:
    """Whether a loaded module is the user's own and has a file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and is_own(Path(file))


def _version(module: str) -> str | None:
    """Name and version of the installed package that a module belongs to, if it belongs to one."""
    names = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or None


_loaded: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()
"""Digest of a loaded module's file when it was first seen."""


def _unchanged(name: str, file: Path) -> str:
    """The digest of a module's file, after checking that this process runs that code."""
    now, module = file_digest(file), sys.modules.get(name)
    if module is not None and _loaded.setdefault(module, now) != now:
        raise ConfigError(f"{file} has changed since this process loaded it; start the command or the notebook again")
    return now


# ---- networks ---------------------------------------------------------------------------------------------------


def network_digest(net: torch.nn.Module) -> str:
    """sha256 of a network: its weights, its classes' names, the user's own code among them, and its configuration.

    Versions, paths and keys of the configuration that only saved files have do not count.
    """
    modules = list(net.modules())
    config: Any = getattr(net, "config", {})
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return digest(
        [type(module).__qualname__ for module in modules],
        own_code({type(module).__module__ for module in modules}),
        _stable(content),
        *(part for name, tensor in sorted(net.state_dict().items()) for part in (name, tensor)),
    )


_LEFT_OUT = ("transformers_version", "dtype", "torch_dtype", "architectures")


def _stable(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in _LEFT_OUT}
    return json.dumps(kept, sort_keys=True, default=str)
