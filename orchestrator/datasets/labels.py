"""Uniformly drawn class labels, the conditioning of class-conditional models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.datasets.base import Dataset, IntArray, uniform


@dataclass(frozen=True)
class Labels(Dataset):
    """Class labels drawn uniformly from ``classes`` whole numbers.

    Attributes:
        classes: Number of classes.
        first: The first label, 1 for networks that count from one; the last is first + classes - 1.
    """

    classes: int = 10
    first: int = 0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}")
        if self.first < 0:
            raise ValueError(f"first must not be negative, got {self.first}")

    def label_count(self) -> int:
        return self.first + self.classes

    def label_problem(self, count: int, classes: int, model: str) -> str:
        if self.first:
            return (
                f"conditioning draws labels {self.first} to {count - 1}, but {model} has {classes}, from 0 to "
                f"{classes - 1}; set the model's classes to {count} if it counts from {self.first}, or correct "
                f"conditioning.options"
            )
        return (
            f"conditioning draws from {count} classes, but {model} has {classes}; set conditioning.options.classes to "
            f"{classes}"
        )

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return self.first + uniform(seed, indices, self.classes)

    def conditioned_on(self) -> Iterable[int]:
        return (self.classes, self.first) if self.first else (self.classes,)


DATASET = Labels
