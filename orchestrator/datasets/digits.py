"""The 8x8 handwritten digits of scikit-learn: 1,797 grey images of ten classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from orchestrator.datasets.base import Dataset, IntArray, LabelledSamples, uniform


@dataclass(frozen=True)
class Digits(Dataset):
    """Labels drawn from scikit-learn's handwritten digits, whose images, in [-1, 1], are the reference set."""

    def label_count(self) -> int:
        return 10

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        labels = self.reference().labels
        return labels[uniform(seed, indices, len(labels))]

    def conditioned_on(self) -> Iterable[IntArray]:
        return (self.reference().labels,)

    def reference(self) -> LabelledSamples:
        return _load()


@cache
def _load() -> LabelledSamples:
    from sklearn.datasets import load_digits  # importing it takes a second, and only this function needs it

    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None] / 8 - 1
    return LabelledSamples(images, digits.target.astype(np.int64))


DATASET = Digits
