"""Uniformly drawn class labels, the conditioning of class-conditional models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.datasets.base import Dataset, IntArray, uniform


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

    def label_count(self) -> int:
        return self.classes

    def label_problem(self, count: int, classes: int, model: str) -> str:
        return (
            f"conditioning draws from {count} classes, but {model} has {classes}; set conditioning.options.classes to "
            f"{classes}"
        )

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return uniform(seed, indices, self.classes)

    def conditioned_on(self) -> Iterable[int]:
        return (self.classes,)


DATASET = Labels
