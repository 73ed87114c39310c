"""scikit-learn's 8x8 handwritten digits: 1,797 grey images of ten classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from orchestrator.datasets.base import Dataset, LabelledSamples
from orchestrator.randomness import generator


@dataclass(frozen=True)
class Digits(Dataset):
    """Labels drawn from the real digits, which are also the reference set, in [-1, 1]."""

    def conditions(self, seed: int, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        labels = self.reference().labels
        return np.array([labels[generator(seed, i, "condition").integers(len(labels))] for i in indices])

    def reference(self) -> LabelledSamples:
        return _load()


@cache
def _load() -> LabelledSamples:
    from sklearn.datasets import load_digits  # a second of import time, wanted only here

    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None] / 8 - 1
    return LabelledSamples(images, digits.target.astype(np.int64))


DATASET = Digits
