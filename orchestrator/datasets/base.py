"""What a dataset offers: conditioning for pair i, and a reference set where it has one.

Metrics ask for more where a dataset has it, by these methods:

- ``texts(conditions)``: the prompt of each sample, list of str;
- ``transcripts(conditions)``: the words that each sample is to say, list of str;
- ``spoken(conditions)``: first and last second of the part of each sample that is to be spoken, list of pairs;
- ``voices(conditions)``: a wave of the voice that each sample is to be spoken in, with its samples a second.
"""

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

    def real_count(self) -> int:
        """How many real samples there are to compare with; 0 where there are none."""
        found = self.reference()
        return 0 if found is None else len(found.samples)

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """These real samples, (len(indices), C, H, W) in [-1, 1]. Overridden where they do not all fit in memory."""
        found = self.reference()
        if found is None:
            raise ValueError(f"{type(self).__name__} has no real samples")
        return found.samples[list(indices)]
