"""Uniformly drawn class labels, the conditioning of class-conditional models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.datasets.base import Dataset
from orchestrator.randomness import generator


@dataclass(frozen=True)
class Labels(Dataset):
    """Class labels drawn uniformly from 0..classes-1.

    Attributes:
        classes: Number of classes.
    """

    classes: int = 10

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}")

    def conditions(self, seed: int, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array([generator(seed, i, "condition").integers(self.classes) for i in indices], dtype=np.int64)


DATASET = Labels
