"""Weights files as people have them: safetensors, and files of torch with nested containers; no code in them is run."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orchestrator.content import pickled_globals
from orchestrator.errors import describe

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")

LISTED = 5
"""Number of names listed per kind of problem in an error message."""

DEPTH = 6
"""Levels of containers within containers that are searched for weights."""

LFS_POINTER = b"version https://git-lfs"


class Inert(list[Any]):
    """Stands for an object that is not a tensor, e.g. one of a framework's settings; nothing of its class is run.

    It is a list because objects of list classes are filled item by item.
    """

    origin = ""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key of a dictionary

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Leave the object's state out."""


def inert_mapping(*arguments: Any) -> dict[Any, Any]:
    """Make an empty dictionary in place of one of another class."""
    return {}


@dataclass(frozen=True)
class Part:
    """Which part of a file holds weights.

    Attributes:
        key: Dotted path into nested containers; None for the top.
        prefix: Beginning of the names that belong to the part, which is taken off them.
    """

    key: str | None = None
    prefix: str = ""


def parts_of(
    file: Path | None, weights_key: str | list[str] | None, weights_prefix: str | list[str] | None
) -> tuple[Part, ...]:
    """The parts of a file that these options name; a single value counts for all parts.

    Raises:
        ValueError: There is no file, a value is not a text, or the numbers of values differ.
    """
    values: dict[str, list[str | None]] = {}
    for option, value in {"weights_key": weights_key, "weights_prefix": weights_prefix}.items():
        values[option] = list(value) if isinstance(value, list) and value else [value]  # type: ignore[list-item]
        if not all(isinstance(item, str) or item is None for item in values[option]):
            raise ValueError(f"{option} must be a text or a list of texts, got {value!r}")
        if value is not None and file is None:
            raise ValueError(f"{option} has no effect without weights; set weights, or leave {option} out")
    count = max(map(len, values.values()))
    keys, prefixes = (items * count if len(items) == 1 else items for items in values.values())
    if len(keys) != len(prefixes):
        raise ValueError(f"weights_prefix needs an entry for each of the {len(keys)} of weights_key, or just one")
    return tuple(Part(key, prefix or "") for key, prefix in zip(keys, prefixes, strict=True))


def read(path: Path, *, trust_pickle: bool = False) -> Any:
    """The content of a weights file: tensors, mapped from the disk where the format allows it, in containers.

    Args:
        path: The file.
        trust_pickle: Whether code in the file may run. Without it, objects of other classes than tensors' and
            containers' are :class:`Inert`.

    Raises:
        ValueError: The file cannot be read; the message says what it is, and the remedy.
    """
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is not the file itself but a pointer of Git LFS; fetch it with 'git lfs pull'")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not safetensors: {error}") from error
    zipped = zipfile.is_zipfile(path)
    if zipped and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"{path} is TorchScript, code and weights in one; load it with the adapter 'torchscript'")
    if trust_pickle:
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped)
        except Exception as error:  # a pickle's code may raise anything
            raise ValueError(
                f"{path} cannot be opened: {describe(error, called=True)}; set path to the folders of the modules that "
                f"it names ({listed(_foreign(_referred(path)))})"
            ) from error
    return _read_inert(path, mmap=zipped)


def _read_inert(path: Path, *, mmap: bool) -> Any:
    names: list[str] = []
    try:
        names = _referred(path)
        stubs: dict[str, Any] = {name: type("Inert", (Inert,), {"origin": name}) for name in names}
        stubs |= {"collections.defaultdict": inert_mapping}
        replaced: list[Any] = [(stub, name) for name, stub in stubs.items()]
        with warnings.catch_warnings(), torch.serialization.safe_globals(replaced):  # torch's own take precedence
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, AttributeError, KeyError) as error:
        foreign = _foreign(names)
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        holds = f"; it refers to {listed(foreign)}" if foreign else ""
        raise ValueError(
            f"{path} is damaged or not a file of torch.save, and is not loaded, because unpickling it could run code"
            f"{holds}; save only the state dictionary, preferably as safetensors ({reason.splitlines()[0]})"
        ) from error


def _referred(path: Path) -> list[str]:
    """Names of all classes and functions that a file refers to, as this Python calls them."""
    names = []
    for module, name in pickled_globals(path):
        new = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
        names.append(".".join(new))
    return names


def _foreign(names: list[str]) -> list[str]:
    """The names that do not belong to torch, nor to every file of it."""
    return [name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))]


# ---- parts --------------------------------------------------------------------------------------------------------


def resolve(content: Any, key: str | None, path: Path) -> Any:
    """The object at a dotted path into nested containers; names in the containers may hold dots themselves.

    Raises:
        ValueError: There is none; the message says what the last container that was reached holds.
    """
    node, rest, passed = content, key or "", ""
    while rest:
        names = {str(name): value for name, value in entries(node)}
        fitting = [name for name in names if rest == name or rest.startswith(f"{name}.")]
        if not fitting:
            place = f"its {passed!r}" if passed else "it"
            raise ValueError(f"weights_key={key!r} is not in {path}: {place} holds {describe_content(node)}")
        name = max(fitting, key=len)
        node, rest, passed = names[name], rest[len(name) + 1 :], f"{passed}.{name}".lstrip(".")
    return node


def containers(content: Any, key: str | None = None, depth: int = 0) -> Iterator[tuple[str | None, Any]]:
    """All containers that hold tensors directly, with their keys, the outer ones first."""
    if tensors_in(content):
        yield key, content
    if depth < DEPTH:
        for name, value in entries(content):
            if isinstance(value, Mapping | list | tuple | nn.Module):
                yield from containers(value, str(name) if key is None else f"{key}.{name}", depth + 1)


def tensors_in(node: Any) -> dict[str, Any] | list[Tensor] | None:
    """Tensors by name, or a list of tensors; None for what holds none. What else a mapping holds is left out."""
    if isinstance(node, nn.Module):
        return dict(node.state_dict())
    if isinstance(node, Mapping):
        return {str(name): value for name, value in node.items() if isinstance(value, Tensor)} or None
    if isinstance(node, list | tuple) and node and all(isinstance(item, Tensor) for item in node):
        return list(node)
    return None


def describe_content(node: Any) -> str:
    """What an object in a file is, for error messages."""
    if isinstance(node, Inert):
        return f"a pickled {node.origin}"
    if isinstance(node, Mapping):
        return f"a mapping with {listed(list(node))}" if node else "an empty mapping"
    return f"a {type(node).__name__}"


def entries(node: Any) -> list[tuple[Any, Any]]:
    """Names and values of what a container holds directly; tensors of a list are left out."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list | tuple) and not isinstance(node, Inert):
        return list(enumerate(node)) if not all(isinstance(item, Tensor) for item in node) else []
    return []


def listed(names: Sequence[Any]) -> str:
    listed = ", ".join(str(name) for name in names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"
