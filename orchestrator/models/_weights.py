"""Weight loading for third-party networks: named tensors from safetensors, or from tensor-only torch files."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orchestrator.errors import describe

SUFFIXES = (".safetensors", ".pt", ".pth")

LISTED = 5
"""Number of names listed per kind of problem in an error message."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors in a file; for safetensors only the header is read.

    Raises:
        ValueError: As for :func:`read_tensors`.
    """
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not safetensors: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a file by name, without running any code from the file.

    Raises:
        ValueError: The file cannot be read, holds more than tensors, or is not a state dictionary.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not safetensors: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and is not loaded, because unpickling it could run code; "
            f"save only the state dictionary, preferably as safetensors ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = f"a mapping with {_listed(list(content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} is not a state dictionary but {keys}; save only the module's state_dict(), preferably as "
            f"safetensors"
        )
    return dict(content)


def check_fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    """Refuse weights that do not fit this module.

    A tied weight may be saved under any one of its names, as in safetensors files.

    Raises:
        ValueError: Weights are missing, unexpected or of the wrong shape; the message lists their names.
    """
    state = module.state_dict(keep_vars=True)
    present = {id(state[name]) for name in shapes if name in state}
    missing = [name for name, value in state.items() if name not in shapes and id(value) not in present]
    unexpected = [name for name in shapes if name not in state]
    reshaped = [
        f"{name} {shape} instead of {tuple(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and shape != tuple(state[name].shape)
    ]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights of {origin} do not fit {type(module).__name__}: {'; '.join(problems)}; set kwargs to the "
            f"factory arguments used in training, or rename the weights to match the module"
        )


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the weights in a file into a module, in the module's dtype.

    Raises:
        ValueError: The file cannot be read, or its weights do not fit.
    """
    tensors = read_tensors(path)
    check_fit(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    module.load_state_dict(tensors, strict=False)  # not strict: the file holds a tied weight under one name only


def build_module(factory: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network by calling its factory.

    Raises:
        ValueError: The factory fails, or does not return a module.
    """
    try:
        module = factory(**copy.deepcopy(dict(kwargs)))  # a factory may change what it is given
    except Exception as error:  # the constructor may raise anything
        raise ValueError(f"{name} with kwargs {dict(kwargs)} fails: {describe(error, called=True)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def build_without_weights(factory: Callable[[], Any]) -> Any:
    """Build a module for its shapes, without allocating memory for weights if its constructor allows that."""
    try:
        with torch.device("meta"):
            return factory()
    except Exception:
        # Constructors that compute with tensor values fail on the meta device. Any other error is raised again here.
        return factory()


def _listed(names: list[Any]) -> str:
    listed = ", ".join(str(name) for name in names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"
