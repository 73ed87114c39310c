"""Weights of other people's networks: tensors by name, from safetensors or from torch's files read as tensors alone."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")

LISTED = 5
"""Names that an error lists of each kind."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a file; of safetensors only the header is read.

    Raises:
        ValueError: As :func:`read_tensors`.
    """
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not safetensors: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. No code of the file is run.

    Raises:
        ValueError: The file cannot be read, holds more than tensors, or is no state dictionary.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not safetensors: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is not read: a pickle runs code of whoever wrote it; "
            f"save the state dictionary alone, best as safetensors ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        keys = f"a mapping with {_listed(list(found))}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"{path} is no state dictionary but {keys}; save the module's state_dict() alone, best as safetensors"
        )
    return dict(found)


def check_fit(module: nn.Module, found: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    """Refuse weights that are not those of this module.

    A tied weight may be saved under any one of its names, as safetensors does.

    Raises:
        ValueError: Listing names that are missing, left over, or of another shape.
    """
    state = module.state_dict(keep_vars=True)
    present = {id(state[name]) for name in found if name in state}
    missing = [name for name, value in state.items() if name not in found and id(value) not in present]
    unexpected = [name for name in found if name not in state]
    reshaped = [
        f"{name} {shape} for {tuple(state[name].shape)}"
        for name, shape in found.items()
        if name in state and shape != tuple(state[name].shape)
    ]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing", missing), ("left over", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights of {origin} do not fit {type(module).__name__}: {'; '.join(problems)}; give the factory's "
            f"arguments with which they were trained (kwargs), or the names as the module has them"
        )


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a file's weights into the module they belong to, in the module's dtype.

    Raises:
        ValueError: The file cannot be read, or does not fit.
    """
    tensors = read_tensors(path)
    check_fit(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    module.load_state_dict(tensors, strict=False)  # a tied weight has one name in the file


def build_module(factory: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The network that the factory makes.

    Raises:
        ValueError: It makes none.
    """
    try:
        module = factory(**kwargs)
    except Exception as error:  # whatever the constructor does
        raise ValueError(f"{name} with kwargs {dict(kwargs)} fails: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must make a torch.nn.Module, got {type(module).__name__}")
    return module


def build_without_weights(factory: Callable[[], Any]) -> Any:
    """The module with its shapes and, where its constructor allows, no memory for its weights."""
    try:
        with torch.device("meta"):
            return factory()
    except Exception:
        # Constructors that compute with their tensors cannot run without numbers; what is wrong shows again below.
        return factory()


def import_factory(given: Any, folder: str | None) -> Callable[..., Any]:
    """The class or function at ``"package.module:name"``.

    Args:
        given: The import path.
        folder: Folder of a module that is not installed; it goes to the front of ``sys.path``, where it stays: a
            network may import its neighbours when it first runs.

    Raises:
        ValueError: Naming what is not there, or is taken from elsewhere, and the remedy.
    """
    module_name, colon, name = str(given).partition(":")
    if not (isinstance(given, str) and module_name and colon and name):
        raise ValueError(f"factory={given!r} names no class or function; write it as 'package.module:name'")
    root = find_modules_in(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        hint = "set path to the folder that holds it" if root is None else f"looked for in {root} too"
        raise ValueError(f"factory={given!r} cannot be imported ({type(error).__name__}: {error}); {hint}") from error
    origin = getattr(module, "__file__", None)
    if root is not None and (origin is None or not Path(origin).resolve().is_relative_to(root.resolve())):
        raise ValueError(
            f"factory={given!r} is taken from {origin}, not from path {root}: another module has the same name; rename "
            f"yours, or leave path out"
        )
    found = getattr(module, name, None)
    if not callable(found):
        what = f"{name!r}" if found is None else f"class or function {name!r}, only {type(found).__name__}"
        raise ValueError(f"factory={given!r}: the module {module_name!r} has no {what}")
    return found


def find_modules_in(folder: str | None) -> Path | None:
    """Let modules be imported from a folder; its absolute path.

    Raises:
        ValueError: There is no such folder.
    """
    if folder is None:
        return None
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(f"path: there is no folder {root}; every machine that runs a host needs it there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return root


def _listed(names: list[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"
