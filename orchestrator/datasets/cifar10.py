"""CIFAR-10 (Krizhevsky 2009): 60,000 small colour photographs of ten classes, read from Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from orchestrator.datasets._images import opened, size_of_intact
from orchestrator.datasets._parquet import RowGroups, check_columns, labels
from orchestrator.datasets.base import Dataset, IntArray, LabelledSamples, uniform
from orchestrator.plugins import PATH

SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Cifar10(Dataset):
    """CIFAR-10 class labels, drawn uniformly; only the reference set needs the image files.

    Attributes:
        folder: Folder of ``cifar10-train.parquet`` and ``cifar10-test.parquet``, with columns ``image`` (an encoded
            32x32 image) and ``label``.
        split: Split used as the reference set, ``train`` or ``test``.
        side: Height and width, a divisor of 32; below 32, each pixel is the average of a square.
        grayscale: One channel (ITU-R 601 luma) instead of three.

    Raises:
        ValueError: The split is unknown, or the side does not divide 32.
    """

    folder: str = field(default="data", metadata=PATH)
    split: Literal["train", "test"] = "train"
    side: int = SIDE
    grayscale: bool = False

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {self.split!r}")
        if self.side < 1 or SIDE % self.side:
            raise ValueError(f"side must divide {SIDE}, got {self.side}")

    def label_count(self) -> int:
        return len(CLASSES)

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return uniform(seed, indices, len(CLASSES))

    def conditioned_on(self) -> Iterable[Any]:
        return (len(CLASSES),)

    @cached_property
    def _images(self) -> RowGroups:
        """The encoded images of the split; they are decoded on access.

        Raises:
            ValueError: The file does not exist, or lacks a column.
        """
        if not self.path.is_file():
            raise ValueError(f"no file {self.path}; set the dataset's option 'folder' to the folder of that file")
        check_columns(self.path, ("image", "label"))
        return RowGroups([self.path], "image")

    @property
    def path(self) -> Path:
        """Parquet file of the split."""
        return Path(self.folder) / f"cifar10-{self.split}.parquet"

    def reference(self) -> LabelledSamples:
        """Every image of the split, (N, C, side, side) in [-1, 1].

        Raises:
            ValueError: The file does not exist, or does not hold 32x32 images.
        """
        images = self.real_samples(range(len(self._images)))
        return LabelledSamples(images, labels(self.path, "label"))

    def real_count(self) -> int:
        return len(self._images) if self.path.is_file() else 0

    def check_real(self) -> None:
        for row in range(len(self._images)):
            self._check_size(size_of_intact(self._images[row], f"row {row} of {self.path}"))

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        images = np.stack([self._decoded(self._images[i], f"row {i} of {self.path}") for i in indices])
        return images.astype(np.float32) / 127.5 - 1

    def real_parts(self) -> Iterable[Any]:
        return self.path, self.side, self.grayscale

    def _check_size(self, size: tuple[int, int]) -> None:
        if size != (SIDE, SIDE):
            raise ValueError(f"{self.path} holds an image of size {size}; CIFAR-10 images are {SIDE}x{SIDE}")

    def _decoded(self, encoded: bytes, where: str) -> npt.NDArray[np.float32]:
        image = opened(encoded, where, self.grayscale)
        self._check_size(image.size)
        pixels = np.asarray(image, dtype=np.float32).reshape(SIDE, SIDE, -1).transpose(2, 0, 1)
        block = SIDE // self.side
        averaged: npt.NDArray[np.float32] = pixels.reshape(-1, self.side, block, self.side, block).mean(axis=(2, 4))
        return averaged


DATASET = Cifar10
