"""Parquet files of images with labels or texts, the format of datasets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.datasets._images import ImageSet
from orchestrator.datasets._parquet import RowGroups, check_columns, labels, texts
from orchestrator.datasets.base import IntArray, uniform
from orchestrator.files import data_files
from orchestrator.plugins import PATH


@dataclass(frozen=True)
class ImageParquet(ImageSet):
    """Images in Parquet files, with class labels or prompts; one row group is in memory at a time.

    A row is drawn uniformly. The conditioning is its label or, with texts, its number; without either it is 0.

    Attributes:
        path: A file, or a folder whose ``*.parquet`` files are read in order of name.
        image_column: Column of encoded images: bytes, or a struct with a field ``bytes``.
        label_column: Column of integer class labels; None if there are none.
        text_column: Column of prompts; None if there are none.

    Raises:
        ValueError: No file matches, a column is missing, the files hold no row, or both labels and texts are set.
    """

    path: str = field(metadata=PATH)
    image_column: str = "image"
    label_column: str | None = None
    text_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_column is not None and self.text_column is not None:
            raise ValueError("conditioning uses either labels or texts; remove label_column or text_column")
        if not self.files:
            raise ValueError(f"no Parquet file at {self.path}; set path to a file, or to a folder of Parquet files")
        for file in self.files:
            check_columns(file, (self.image_column, self.label_column, self.text_column))
        if not self.real_count():
            raise ValueError(f"{self.path} holds no rows")

    @cached_property
    def files(self) -> list[Path]:
        """Paths of the Parquet files, sorted by name."""
        path = Path(self.path)
        return [path] if path.is_file() else data_files(path, [".parquet"], below=False)

    @cached_property
    def _images(self) -> RowGroups:
        return RowGroups(self.files, self.image_column)

    @cached_property
    def _labels(self) -> IntArray:
        assert self.label_column is not None
        return np.concatenate([labels(file, self.label_column) for file in self.files])

    @cached_property
    def _texts(self) -> list[str]:
        assert self.text_column is not None
        return [text for file in self.files for text in texts(file, self.text_column)]

    def label_count(self) -> int | None:
        if self.text_column is not None:
            return None
        return int(self._labels.max()) + 1 if self.label_column is not None else 1

    def label_problem(self, count: int, classes: int, model: str) -> str:
        row = int(np.argmax(self._labels >= classes))
        return (
            f"row {row} of {self.path} has label {self._labels[row]} in column {self.label_column!r}, but {model} has "
            f"only {classes} classes, from 0; correct or remove such rows"
        )

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        drawn = uniform(seed, indices, self.real_count())
        if self.text_column is not None:
            return drawn
        return self._labels[drawn] if self.label_column is not None else np.zeros_like(drawn)

    def conditioned_on(self) -> Iterable[Any]:
        if self.text_column is not None:
            return self._texts
        return (self._labels if self.label_column is not None else self.real_count(),)

    def real_parts(self) -> Iterable[Any]:
        return self.prepared(self.image_column, *self.files)

    @property
    def texts(self) -> Callable[[Sequence[int]], list[str]]:
        """``texts(conditions)``: the prompts of these rows; the attribute exists only with a text column."""
        if self.text_column is None:
            raise AttributeError("this dataset has no texts; set text_column")
        return lambda conditions: [self._texts[number] for number in conditions]

    def check(self) -> None:
        super().check()
        if self.text_column is not None:
            _ = self._texts

    def real_count(self) -> int:
        return len(self._images)

    def check_real(self) -> None:
        self.check_images(map(self._encoded, range(self.real_count())), self._names(range(self.real_count())))

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        return self.decoded(map(self._encoded, indices), self._names(indices))

    def _names(self, indices: Sequence[int]) -> list[str]:
        return [f"row {i} of {self.path}" for i in indices]

    def _encoded(self, index: int) -> bytes:
        value = self._images[index]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"row {index} of {self.path} holds {type(value).__name__} instead of an encoded image")
        return value


DATASET = ImageParquet
