"""Named arrays per row, the conditioning of networks that take observations, masks, embeddings or lists of ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.datasets._arrays import Array, NamedArrays, Ragged, call_function, read_file
from orchestrator.datasets.base import SPLITS, Dataset, IntArray, LabelledSamples, Layout, Split, uniform
from orchestrator.pairs.conditions import Conditions
from orchestrator.plugins import PATH
from orchestrator.randomness import generator

LABELS = "y"
"""Name of the labels among the conditions, as in a network's ``call``."""


@dataclass(frozen=True, kw_only=True)
class Tensors(Dataset):
    """Named arrays per row, from a file or a function; the conditioning of a pair is a row, drawn uniformly.

    A network takes them by name: ``call: "x, t, obs=c.obs, mask=c.mask"``. Integers become int64; floats are
    converted to the type of the network's weights. Pairs store the number of the row.

    Attributes:
        file: A .npz, .safetensors or .parquet file. Columns of a Parquet file are numbers, or lists of them, nested
            lists being further axes.
        function: In place of a file, the import path of a function that returns a dictionary of arrays, as
            ``"package.module:name"``. It must return the same arrays in every process.
        path: Folder of the function's module, if it is not installed.
        kwargs: Keyword arguments of the function.
        arrays: Names of the arrays to read, beside those that other options name; by default all.
        shared: Names of arrays that have no axis of rows: all rows share them.
        padding: Value that fills up lists of different lengths to the longest, by the name of their array; 0 for
            those not named.
        padding_masks: For arrays of such lists, the name under which a mask is given to the network, bool (rows,
            longest): true where the list has an entry.
        samples: Name of the array of real samples, in the range of the model's data, for metrics such as Fréchet
            distances.
        mask: Name of an array that is 1 or true where an entry of a sample counts, 0 or false where losses and metrics
            leave it out, as entries that are given to an imputation model; of the sample's shape, or broadcastable.
        labels: Name of the array of class labels, which a network takes as ``y``.
        split: Shares of the rows from which training, validation and test pairs are drawn; rows are assigned at
            random, always in the same way. Or the name of an array that holds train, validation or test (or 0, 1 or
            2) for each row.
        part: Draw from these rows only: train, validation or test. Set for each pair set by the experiment.

    Raises:
        ValueError: An option contradicts another, or the arrays cannot be read or differ in length.
    """

    named: ClassVar[bool] = True
    real_form = "samples"

    file: str | None = field(default=None, metadata=PATH)
    function: str | None = None
    path: str | None = field(default=None, metadata=PATH)
    kwargs: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    padding: dict[str, float] = field(default_factory=dict)
    padding_masks: dict[str, str] = field(default_factory=dict)
    samples: str | None = None
    mask: str | None = None
    labels: str | None = None
    split: dict[str, float] | str = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})
    part: Split | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.function is None):
            raise ValueError("the arrays come from a file or from a function; set one of the options file and function")
        if self.function is None and (self.path is not None or self.kwargs):
            raise ValueError("path and kwargs apply to a function, but file is set; remove them")
        self._check_names()
        self._check_lengths()
        if self.labels is not None:
            _ = self._labels
        if self.mask is not None:
            _ = self._mask
        self._check_split()

    # ---- arrays ------------------------------------------------------------------------------------------------

    @cached_property
    def _read(self) -> NamedArrays:
        names = None
        if self.arrays is not None:
            others = (self.samples, self.mask, self.labels, self.split if isinstance(self.split, str) else None)
            names = tuple(dict.fromkeys([*self.arrays, *self.shared, *(name for name in others if name is not None)]))
        if self.file is not None:
            return read_file(Path(self.file).expanduser(), names)
        assert self.function is not None
        return call_function(self.function, self.path, self.kwargs, names)

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        """All arrays, with lists padded and with the masks of their padding."""
        arrays: dict[str, Array] = {}
        for name, value in self._read.items():
            if not isinstance(value, Ragged):
                arrays[name] = value
                continue
            if not value.present.size:
                raise ValueError(f"all lists of {name!r} of {self._read.source} are empty; leave it out of 'arrays'")
            arrays[name] = value.padded(self.padding.get(name, 0))
            if name in self.padding_masks:
                arrays[self.padding_masks[name]] = value.present
        return arrays

    def _check_names(self) -> None:
        source, present = self._read.source, self._read
        named = [("samples", self.samples), ("mask", self.mask), ("labels", self.labels)]
        named += [("shared", name) for name in self.shared]
        named += [("split", self.split)] if isinstance(self.split, str) else []
        named += [(option, name) for option in ("padding", "padding_masks") for name in getattr(self, option)]
        for option, name in named:
            if name is None:
                continue
            if name not in present:
                raise ValueError(f"{option}: {source} has no array {name!r}; its arrays are: {', '.join(present)}")
            if option.startswith("padding") != isinstance(present[name], Ragged) and option not in ("samples", "mask"):
                listed = isinstance(present[name], Ragged)
                raise ValueError(
                    f"{option} names {name!r}, which {'holds lists' if listed else 'is an array, not lists'}; "
                    f"{'name an array' if listed else 'remove it'}"
                )
        for name, mask in self.padding_masks.items():
            if mask in present:
                raise ValueError(
                    f"padding_masks: {mask!r} is an array of {source} already; name the mask of {name!r} otherwise"
                )
        if LABELS in present and self.labels not in (None, LABELS):
            raise ValueError(f"labels is {self.labels!r}, but {source} has an array {LABELS!r} too; rename that array")

    def _check_lengths(self) -> None:
        lengths = {name: a.shape[0] if a.ndim else 0 for name, a in self._arrays.items() if name not in self.shared}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(
                f"the arrays of {self._read.source} differ in their number of rows: {shown}; list those without an "
                f"axis of rows under 'shared'"
            )
        if not self.rows:
            raise ValueError(f"{self._read.source} has no rows")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return next((len(array) for name, array in self._arrays.items() if name not in self.shared and array.ndim), 0)

    @cached_property
    def layout(self) -> dict[str, Layout]:
        layout = {}
        for name, array in self._arrays.items():
            if array.dtype.kind in "bif":
                shape = array.shape if name in self.shared else array.shape[1:]
                layout[name] = Layout(str(array.dtype), shape)
        return layout | ({LABELS: Layout("int64", ())} if self.labels is not None else {})

    def tensors(self, rows: IntArray, names: Iterable[str]) -> Conditions:
        return Conditions({name: self._of_rows(name, rows) for name in names})

    def _of_rows(self, name: str, rows: IntArray) -> torch.Tensor:
        if name == LABELS and self.labels is not None:
            return torch.from_numpy(self._labels[rows])
        array = self._arrays[name]
        if name in self.shared:
            return torch.from_numpy(array).expand(len(rows), *array.shape)
        return torch.from_numpy(array[rows])

    def check(self) -> None:
        super().check()
        for name, array in self._arrays.items():
            if name != self.samples and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{_first_not_finite(name, array, self._read.source)}; correct or remove the row")
        for split in SPLITS:
            if not len(self._rows_of(split)):
                raise ValueError(
                    f"split leaves no row for {split} pairs: {self._read.source} has {self.rows} rows; give each part "
                    f"a larger share, or more rows"
                )

    @cached_property
    def _mask(self) -> npt.NDArray[np.bool_]:
        assert self.mask is not None
        values = self._arrays[self.mask]
        if values.dtype.kind not in "bif" or not np.isin(values, (0, 1)).all():
            raise ValueError(f"mask: {self.mask!r} of {self._read.source} must hold 0 and 1 only, or true and false")
        if self.mask in self.shared:
            values = np.broadcast_to(values, (self.rows, *values.shape))
        nothing = np.flatnonzero(~values.reshape(len(values), -1).any(axis=1))
        if len(nothing):
            listed = ", ".join(map(str, nothing[:5].tolist())) + (", …" if len(nothing) > 5 else "")
            raise ValueError(
                f"mask: no entry counts in row {listed} of {self.mask!r} of {self._read.source}; remove such rows"
            )
        return values.astype(np.bool_)

    def mask_of(self, rows: IntArray, shape: tuple[int, ...]) -> torch.Tensor | None:
        if self.mask is None:
            return None
        given = self._mask.shape[1:]
        fits = len(given) <= len(shape) and all(a in (1, b) for a, b in zip(given[::-1], shape[::-1], strict=False))
        if not fits:
            raise ValueError(
                f"mask: a row of {self.mask!r} has shape {given}, which does not fit samples of shape {shape}; give "
                f"one value per entry, or an axis of 1 where all entries share it"
            )
        ones = (1,) * (len(shape) - len(given))
        return torch.from_numpy(self._mask[rows].reshape(len(rows), *ones, *given))

    # ---- rows --------------------------------------------------------------------------------------------------

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        drawn = uniform(seed, indices, len(self._drawn_from))
        return self._drawn_from[drawn]

    @cached_property
    def _drawn_from(self) -> IntArray:
        """Numbers of the rows that conditions are drawn from."""
        return np.arange(self.rows) if self.part is None else self._rows_of(self.part)

    def split_options(self, split: Split) -> dict[str, Any]:
        return {"part": split}

    def _check_split(self) -> None:
        if isinstance(self.split, str):
            named = self._arrays[self.split]
            known = np.isin(named, SPLITS if named.dtype.kind in "UO" else range(len(SPLITS)))
            if named.ndim != 1 or named.dtype.kind not in "UOi" or not known.all():
                wrong = "" if named.ndim != 1 else f", got {named[~known][0]!r} in row {int(np.argmax(~known))}"
                raise ValueError(
                    f"split: {self.split!r} must hold {', '.join(SPLITS)}, or 0, 1, 2, for each row{wrong}"
                )
        else:
            shares = self.split
            if set(shares) != set(SPLITS) or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1):
                raise ValueError(
                    f"split must give the shares of train, validation and test, which add up to 1, or name an array; "
                    f"got {dict(shares)}"
                )
        if not len(self._drawn_from):
            raise ValueError(f"no row of {self._read.source} belongs to part {self.part!r}; change split")

    def _rows_of(self, split: Split) -> IntArray:
        number = SPLITS.index(split)
        if isinstance(self.split, str):
            named = self._arrays[self.split]
            return np.flatnonzero(named == (split if named.dtype.kind in "UO" else number))
        order = np.argsort(generator(0, 0, "condition").random(self.rows), kind="stable")
        ends = np.round(np.cumsum([0.0, *(self.split[name] for name in SPLITS)]) * self.rows).astype(int)
        return np.sort(order[ends[number] : ends[number + 1]])

    def conditioned_on(self) -> Iterable[Any]:
        names = sorted(self._arrays)
        padding = {name: self.padding.get(name, 0) for name, value in self._read.items() if isinstance(value, Ragged)}
        yield self._read.content
        yield [names, sorted(self.shared), padding, self.labels, self.mask]
        yield self._drawn_from

    # ---- labels and real samples -------------------------------------------------------------------------------

    @cached_property
    def _labels(self) -> IntArray:
        assert self.labels is not None
        values = self._arrays[self.labels]
        if values.ndim != 1 or values.dtype.kind not in "if":
            raise ValueError(
                f"labels: {self.labels!r} is {values.dtype} of shape {values.shape}, not one whole number per row"
            )
        wrong = np.flatnonzero(~((values >= 0) & (values == np.floor(values)) & np.isfinite(values)))
        if len(wrong):
            raise ValueError(
                f"row {wrong[0]} of {self._read.source} has label {values[wrong[0]]:g} in {self.labels!r}; labels are "
                f"whole numbers from 0"
            )
        return values.astype(np.int64)

    def label_count(self) -> int | None:
        return None if self.labels is None else int(self._labels.max()) + 1

    def check_labels(self, classes: int, model: str) -> None:
        if self.labels is None:
            raise ValueError(
                f"{model} is conditioned on class labels, which Tensors does not provide; set "
                f"conditioning.options.labels to the array that holds them"
            )
        super().check_labels(classes, model)

    def label_problem(self, count: int, classes: int, model: str) -> str:
        row = int(np.argmax(self._labels >= classes))
        return (
            f"row {row} of {self._read.source} has label {self._labels[row]} in {self.labels!r}, but {model} has only "
            f"{classes} classes, from 0; correct or remove such rows"
        )

    def labels_of(self, rows: IntArray) -> IntArray:
        return rows if self.labels is None else self._labels[rows]

    def reference(self) -> LabelledSamples | None:
        if self.samples is None:
            return None
        samples = self._arrays[self.samples].astype(np.float32)
        return LabelledSamples(samples, np.zeros(len(samples), np.int64) if self.labels is None else self._labels)

    def check_real(self) -> None:
        if self.samples is not None and not np.isfinite(array := self._arrays[self.samples]).all():
            raise ValueError(f"{_first_not_finite(self.samples, array, self._read.source)}; correct or remove the row")


def _first_not_finite(name: str, array: npt.NDArray[Any], source: str) -> str:
    row = int(np.argmax(~np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
    return f"row {row} of {name!r} of {source} holds a number that is not finite"


def null_problem(name: str, value: Any, layout: Mapping[str, Layout]) -> str | None:
    """What is wrong with the value of a dropped condition, with the remedy; None if nothing is.

    Args:
        name: The condition.
        value: A number, or the name of an array.
        layout: Types and shapes of a row of the arrays.
    """
    dropped, kept = layout.get(value) if isinstance(value, str) else None, layout[name]
    if isinstance(value, str):
        if dropped is None:
            return f"null names the array {value!r}, but the arrays are: {', '.join(layout)}"
        if dropped != kept:
            return f"null gives {value!r} ({dropped}) for {name!r} ({kept}); both must have one type and shape"
        return None
    if kept.dtype == "bool" and value not in (0, 1):
        return f"null gives {value!r} for {name!r}, which is bool; give 0 or 1"
    if kept.dtype == "int64" and value != int(value):
        return f"null gives {value!r} for {name!r}, which holds whole numbers; give a whole number"
    return None


DATASET = Tensors
