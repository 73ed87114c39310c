"""Named arrays of a dataset, one entry per row, from a file or a function of the user's."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from orchestrator.content import digest, file_digest
from orchestrator.errors import RAISED, describe
from orchestrator.importing import import_factory

Array = npt.NDArray[Any]

SUFFIXES = (".npz", ".safetensors", ".parquet")


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: their entries one after another, (M, ...), and the length of each list, (N,)."""

    entries: Array
    lengths: npt.NDArray[np.int64]

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """Whether a row has an entry at each position of the longest list, (N, L)."""
        present: npt.NDArray[np.bool_] = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        return present

    def padded(self, value: float) -> Array:
        """All lists at the length of the longest, (N, L, ...), with ``value`` at their ends."""
        padded = np.full((*self.present.shape, *self.entries.shape[1:]), value, dtype=self.entries.dtype)
        padded[self.present] = self.entries
        return padded


class NamedArrays(dict[str, Array | Ragged]):
    """Arrays and lists by name: bool, int64, float32 or float64, and texts. ``source`` names their origin."""

    source: str = ""

    @cached_property
    def content(self) -> str:
        """sha256 of names, values and types."""
        parts: list[Any] = []
        for name in sorted(self):
            value = self[name]
            held = (value.entries, value.lengths) if isinstance(value, Ragged) else (value,)
            parts += [name, *(array.tolist() if array.dtype.kind in "UO" else array for array in held)]
        return digest(*parts)


def read_file(path: Path, names: tuple[str, ...] | None) -> NamedArrays:
    """The arrays of a file; read once per process, until the file changes.

    Args:
        path: A .npz, .safetensors or .parquet file.
        names: Names of the arrays; None for all.

    Raises:
        ValueError: The file does not exist, cannot be read, lacks a name, or holds what is not an array.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"file must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; every machine that runs a host needs it there")
    return _read_file(path, names, file_digest(path))


@functools.lru_cache(maxsize=8)
def _read_file(path: Path, names: tuple[str, ...] | None, _content: str) -> NamedArrays:
    readers = {".npz": _from_npz, ".safetensors": _from_safetensors, ".parquet": _from_parquet}
    return _named(str(path), readers[path.suffix](path, lambda present: _chosen(str(path), present, names)))


def call_function(
    function: str, folder: str | None, kwargs: Mapping[str, Any], names: tuple[str, ...] | None
) -> NamedArrays:
    """The arrays that a function returns; it is called once per process.

    Args:
        function: Import path, ``"package.module:name"``.
        folder: Folder of its module, if that is not installed.
        kwargs: Its keyword arguments.
        names: Names of the arrays; None for all.

    Raises:
        ValueError: It cannot be imported, fails, or does not return a dictionary of arrays.
    """
    return _call_function(function, folder, json.dumps(kwargs, sort_keys=True), names)


@functools.lru_cache(maxsize=8)
def _call_function(function: str, folder: str | None, kwargs: str, names: tuple[str, ...] | None) -> NamedArrays:
    called = import_factory(function, folder, "function")
    try:
        arrays = called(**json.loads(kwargs))
    except RAISED as error:  # the user's code may raise anything
        raise ValueError(f"{function} with kwargs {kwargs} fails: {describe(error, called=True)}") from error
    if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
        raise ValueError(f"{function} must return a dictionary of arrays by name, got {type(arrays).__name__}")
    return _named(function, {name: arrays[name] for name in _chosen(function, list(arrays), names)})


def _chosen(source: str, present: list[str], names: tuple[str, ...] | None) -> list[str]:
    missing = [name for name in names or () if name not in present]
    if missing:
        raise ValueError(f"{source} has no array {missing[0]!r}; its arrays are: {', '.join(present)}")
    return list(present if names is None else names)


Choose = Callable[[list[str]], list[str]]


def _from_npz(path: Path, choose: Choose) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .npz file; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in choose(list(file.files))}
    except (OSError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a .npz file: {error}; write it with numpy.savez") from error
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(
            f"{path} holds Python objects, which could run code and are not read; save arrays of numbers, and lists of "
            f"different lengths in a Parquet file"
        ) from error


def _from_safetensors(path: Path, choose: Choose) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in choose(list(file.keys()))}
    except SafetensorError as error:
        raise ValueError(f"{path} is not safetensors: {error}; write it again") from error


def _from_parquet(path: Path, choose: Choose) -> dict[str, Any]:
    try:
        present = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}; replace it") from error
    table = pq.read_table(path, columns=choose(present))
    return {name: _from_column(path, name, table[name].combine_chunks()) for name in table.column_names}


def _from_column(path: Path, name: str, column: Any, *, inside: bool = False) -> Array | Ragged:
    """The values of a column, (rows, ...); nested lists become further axes."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
        where = (
            f"column {name!r} of {path} has an empty value within a list"
            if inside
            else (f"row {row} of {path} is empty in column {name!r}")
        )
        raise ValueError(f"{where}; fill it, or leave the column out under 'arrays'")
    if isinstance(column, pa.FixedShapeTensorArray):
        array: Array = column.to_numpy_ndarray()
        return array
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        values: Array = column.to_numpy(zero_copy_only=False)
        return values
    entries = _from_column(path, name, column.flatten(), inside=True)
    if isinstance(entries, Ragged):
        raise ValueError(
            f"column {name!r} of {path} has lists of different lengths within its lists; only the length of the outer "
            f"ones may differ"
        )
    lengths = (
        np.diff(column.offsets.to_numpy())
        if not pa.types.is_fixed_size_list(kind)
        else np.full(len(column), kind.list_size)
    )
    return _lists(entries, lengths.astype(np.int64), fixed=pa.types.is_fixed_size_list(kind) or inside)


def _lists(entries: Array, lengths: npt.NDArray[np.int64], *, fixed: bool) -> Array | Ragged:
    """Lists as one array if their length is fixed; inner lists count as fixed if all have one length."""
    if fixed and len(set(lengths.tolist())) == 1:
        return entries.reshape(len(lengths), int(lengths[0]), *entries.shape[1:])
    return Ragged(entries, lengths)


def _named(source: str, values: Mapping[str, Any]) -> NamedArrays:
    arrays = NamedArrays({name: _array(source, name, value) for name, value in values.items()})
    arrays.source = source
    return arrays


def _array(source: str, name: str, value: Any) -> Array | Ragged:
    """A value as an array of one of the types of :class:`NamedArrays`; a list of arrays may differ in length.

    Raises:
        ValueError: It is not an array of numbers or texts; names it.
    """
    if isinstance(value, list | tuple) and value and all(np.ndim(item) for item in value):
        parts = [_plain(source, name, item) for item in value]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"the entries of {name!r} of {source} differ in shape beyond their first axis ({parts[0].shape} and "
                f"others); only their length may differ"
            )
        return Ragged(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))
    if isinstance(value, Ragged):
        return Ragged(_plain(source, name, value.entries), value.lengths)
    return _plain(source, name, value)


def _plain(source: str, name: str, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array: Array = np.asarray(value)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    texts = array.dtype.kind == "U" or (array.dtype == object and all(isinstance(item, str) for item in array.flat))
    if array.dtype.kind != "b" and array.dtype not in (np.float32, np.float64) and not texts:
        raise ValueError(
            f"{name!r} of {source} holds {array.dtype}, which is neither numbers nor booleans; leave it out by listing "
            f"the others under 'arrays'"
        )
    return array
