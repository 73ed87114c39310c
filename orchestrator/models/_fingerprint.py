"""Digests of live objects: a function or a network of this process, with all of the user's own that it refers to.

What runs decides, and not a file: of the user's functions, the compiled code, the values of their closures, defaults
and globals; of networks, the bytes of their weights and their attributes. Of installed packages, name and version.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import importlib.metadata
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.content import PRODUCT, digest, is_own, is_own_module, own_code

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, type(...))

LEFT_OUT = {"training"}
"""Attributes of a network that do not decide its velocity: it is evaluated in evaluation mode."""

FLAGS = 0xFFFF
"""Flags of code that decide how it runs; those above are the compiler's (``from __future__``)."""

NOT_OF_A_CLASS = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__"}


@dataclass
class Fingerprint:
    """Digests of the parts of an object, by their path from it.

    Attributes:
        parts: Digest or text of each part.
        unknown: Parts that cannot be digested, by path, with their type.
        networks: The outermost torch modules that it consists of, or refers to.
    """

    parts: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    networks: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, value: Any) -> Fingerprint:
        """The fingerprint of a function, a network, or any other object."""
        walk = _Walk(digest)
        walk.visit("", value)
        return walk.print

    @classmethod
    def networks_of(cls, value: Any) -> list[nn.Module]:
        """The outermost torch modules that a function or a network consists of, or refers to."""
        walk = _Walk(lambda *parts: "")
        walk.visit("", value)
        return walk.print.networks

    @property
    def digest(self) -> str:
        """sha256 of all parts that can be digested."""
        return digest(sorted(self.parts.items()), sorted(self.unknown.items()))

    def changed(self, earlier: Fingerprint) -> list[str]:
        """Paths of the parts that differ from an earlier fingerprint."""
        paths = self.parts.keys() | earlier.parts.keys()
        return sorted(path for path in paths if self.parts.get(path) != earlier.parts.get(path))


class _Walk:
    """Visits everything that a value refers to, once.

    Args:
        digest: Digest of a sequence of parts.
    """

    def __init__(self, digest: Callable[..., str]) -> None:
        self.digest = digest
        self.print = Fingerprint()
        self.paths: dict[int, str] = {}
        self.kept: list[Any] = []  # ids are unique among living objects only
        self.inside = 0  # of networks

    def visit(self, path: str, value: Any) -> None:
        if isinstance(value, PLAIN) and not isinstance(value, enum.Enum):
            self.print.parts[path] = f"{type(value).__name__} {value!r}"
            return
        if id(value) in self.paths:
            self.print.parts[path] = f"as {self.paths[id(value)]}"
            return
        self.paths[id(value)] = path
        self.kept.append(value)
        match value:
            case torch.Tensor() | np.ndarray() | np.generic():
                self._array(path, value)
            case Mapping():
                self._items(
                    path,
                    {
                        f"[{key!r}]" if isinstance(key, PLAIN) else f"[{n}]": item
                        for n, (key, item) in enumerate(value.items())
                    },
                )
            case list() | tuple():
                self._items(path, {f"[{number}]": item for number, item in enumerate(value)})
            case set() | frozenset():
                self._items(path, {f"{{{number}}}": item for number, item in enumerate(sorted(value, key=repr))})
            case torch.jit.ScriptModule() | torch.jit.ScriptFunction():
                self._script(path, value)
            case nn.Module():
                self._network(path, value)
            case types.CodeType():
                self._code(path, value)
            case types.FunctionType():
                self._function(path, value)
            case types.MethodType():
                self._items(path, {"()": value.__func__, "": value.__self__})
            case types.ModuleType():
                self.print.parts[path] = f"module {value.__name__} {_version(value.__name__)}"
            case type():
                self._class(path, value)
            case property():
                self._items(path, {".get": value.fget, ".set": value.fset})
            case staticmethod() | classmethod():
                self.visit(path, value.__func__)
            case functools.partial():
                self._items(path, {"()": value.func, ".args": value.args, ".keywords": value.keywords})
            case types.BuiltinFunctionType() | types.MethodDescriptorType() | types.WrapperDescriptorType():
                self._builtin(path, value)
            case _:
                self._object(path, value)

    def _items(self, path: str, items: Mapping[str, Any]) -> None:
        self.print.parts[f"{path}#"] = str(len(items))
        for name, item in items.items():
            self.visit(path + name, item)

    def _array(self, path: str, value: Any) -> None:
        try:
            self.print.parts[path] = self.digest(np.asarray(value) if isinstance(value, np.generic) else value)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # sparse, quantised, of objects
            self._unknown(path, value)

    def _network(self, path: str, value: nn.Module) -> None:
        compiled_from = vars(value).get("_modules", {}).get("_orig_mod")
        if compiled_from is not None:  # by torch.compile, whose own state decides no number
            self.visit(path, compiled_from)
            return
        if not self.inside:
            self.print.networks.append(value)
        self.inside += 1
        self.visit(f"{path}:class", type(value))
        attributes = {name: item for name, item in vars(value).items() if name not in LEFT_OUT}
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, item in attributes.pop(kind, {}).items():
                self.visit(f"{path}.{name}", item)
        for name, item in attributes.items():
            self.visit(f"{path}.{name}", item)
        self.inside -= 1

    def _script(self, path: str, value: Any) -> None:
        self.print.parts[path] = self.digest(value.save_to_buffer())
        if isinstance(value, nn.Module) and not self.inside:
            self.print.networks.append(value)

    def _function(self, path: str, value: types.FunctionType) -> None:
        original = getattr(value, "_torchdynamo_orig_callable", None)
        if original is not None:
            self.visit(path, original)
            return
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for name, cell in cells:
            with contextlib.suppress(ValueError):  # not assigned yet
                self.visit(f"{path}.{name}", cell.cell_contents)
        self.visit(f"{path}.defaults", (value.__defaults__, value.__kwdefaults__))
        if not _is_users(value.__code__.co_filename):
            self.print.parts[path] = f"function {value.__module__}.{value.__qualname__} {_version(value.__module__)}"
            return
        self._code(path, value.__code__)
        for name, item in _globals(value.__code__, value.__globals__):
            self.visit(f"{path}/{name}", item)

    def _code(self, path: str, code: types.CodeType) -> None:
        constants = [item for item in code.co_consts if not isinstance(item, types.CodeType)]
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & FLAGS)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self.print.parts[path] = self.digest(
            code.co_code, code.co_exceptiontable, [*shape], [list(one) for one in names]
        )
        self.visit(f"{path}.constants", constants)
        for number, item in enumerate(code.co_consts):
            if isinstance(item, types.CodeType):
                self._code(f"{path}.code{number}", item)
        for module in _imported(code):
            self.print.parts[f"{path}/import {module}"] = self.digest(own_code([module]), _version(module))

    def _class(self, path: str, value: type) -> None:
        self.print.parts[path] = f"class {value.__module__}.{value.__qualname__} {_version(value.__module__)}"
        if not _is_own_class(value):
            return
        for number, base in enumerate(value.__bases__):
            self.visit(f"{path}.base{number}", base)
        for name, item in sorted(vars(value).items()):
            if name not in NOT_OF_A_CLASS and not isinstance(
                item, types.GetSetDescriptorType | types.MemberDescriptorType
            ):
                self.visit(f"{path}.{name}", item)

    def _builtin(self, path: str, value: Any) -> None:
        self.print.parts[path] = f"built-in {getattr(value, '__module__', '')}.{value.__qualname__}"
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType | type):
            self.visit(f"{path}.self", owner)

    def _object(self, path: str, value: Any) -> None:
        """Any other object, as far as it can be copied."""
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and callable(value):  # a cache around a function
            self.visit(path, wrapped)
            return
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever the class raises: locks, files, sessions of other libraries
            self._unknown(path, value)
            return
        if isinstance(reduced, str):
            self.print.parts[path] = f"{type(value).__module__}.{reduced}"
            return
        make, arguments, *state = reduced
        self.visit(f"{path}:class", type(value))
        self.visit(f"{path}:make", make)
        rest = [list(item) if isinstance(item, Iterator) else item for item in state]
        self._items(path, {":arguments": arguments, ":state": rest})

    def _unknown(self, path: str, value: Any) -> None:
        self.print.unknown[path or "itself"] = f"{type(value).__module__}.{type(value).__qualname__}"


def _globals(code: types.CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that code refers to, by name; of the user's own modules, their attributes that it refers to."""
    instructions = list(dis.get_instructions(code))
    for instruction, following in itertools.zip_longest(instructions, instructions[1:]):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in namespace:
            value = namespace[name]
            yield name, value
            if isinstance(value, types.ModuleType) and is_own_module(value.__name__):
                attribute = following.argval if following.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
                if attribute is None:
                    yield f"{name}.code", own_code([value.__name__])
                elif hasattr(value, attribute):
                    yield f"{name}.{attribute}", getattr(value, attribute)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant, namespace)


def _imported(code: types.CodeType) -> list[str]:
    """Modules that code imports itself."""
    return [item.argval for item in dis.get_instructions(code) if item.opname == "IMPORT_NAME" and item.argval]


def _is_users(file: str) -> bool:
    """Whether code of this file is the user's; that of a notebook or a prompt has no file."""
    return not file.startswith("<frozen") and (not Path(file).is_file() or is_own(Path(file)))


def _is_own_class(value: type) -> bool:
    if value.__module__ == "__main__":
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    if file is not None:
        return is_own(Path(file))
    functions = (item for item in vars(value).values() if isinstance(item, types.FunctionType))
    return any(_is_users(function.__code__.co_filename) for function in functions)


@functools.cache
def _version(module: str | None) -> str | None:
    """Version of the package that a module belongs to; None for the user's, the product's and the standard library."""
    root = str(module).partition(".")[0]
    if root in {path.name for path in PRODUCT}:
        return None
    version = getattr(sys.modules.get(root), "__version__", None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        version = version or importlib.metadata.version(root)
    return None if version is None else f"{root} {version}"
