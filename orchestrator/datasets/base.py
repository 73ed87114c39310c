"""What a dataset offers: conditioning for pair i, and a reference set where it has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class LabelledSamples(NamedTuple):
    """Real data: ``samples`` float32 (N, ...) in the model's data range, ``labels`` int64 (N,)."""

    samples: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


class Dataset(ABC):
    """A source of conditioning. A subclass's dataclass fields are its options."""

    @abstractmethod
    def conditions(self, seed: int, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """The conditioning of these pairs, shape (len(indices), ...): a function of (seed, index) alone."""

    def reference(self) -> LabelledSamples | None:
        """The real samples this dataset stands for, or None."""
        return None
