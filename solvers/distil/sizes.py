"""Sizes of a distillation without a backward pass, from the size of theta, of a sample, and the NFE.

One pair gives as many residuals as a sample has dimensions d, and an iteration solves for p numbers. What counts is
therefore p / d, the pairs that would determine theta exactly. Early iterations are far from precise, so few pairs
suffice for them; each further iteration takes more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MULTIPLE = 16
"""Pair sets are this many pairs, or a multiple of it, so that they grow by whole batches of ground truth."""

LEAST_FIRST_BATCH, LEAST_TRAIN = 2, 32
LARGEST_TRAIN = 512
"""Training pairs beyond which a solver no longer improves on other samples, on any shipped model."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a distillation.

    Attributes:
        train: Training pairs, unless overfitting asks for more.
        validation: Validation pairs, which choose the iterate and end the run.
        first_batch: Pairs of the first iteration.
        batch_growth: Growth of the pairs per iteration.
        largest_batch: Most pairs of an iteration, if there are so many.
        memory_pairs: Pairs of an iteration from which on it no longer needs the equations of earlier ones.
        patience: Validations in a row without a new best that end a run.
    """

    train: int
    validation: int
    first_batch: int
    batch_growth: float
    largest_batch: int
    memory_pairs: int
    patience: int

    def more_train(self, train: int) -> int | None:
        """Training pairs after ``train`` that overfit: twice as many; None if more would not help."""
        return 2 * train if 2 * train <= LARGEST_TRAIN else None


def sizes(numbers: int, dimensions: int, nfe: int) -> Sizes:
    """The sizes for a solver of ``nfe`` evaluations.

    Args:
        numbers: How many numbers are learned, p (:meth:`solvers.families.base.LearnableFamily.freedom`).
        dimensions: Dimensions of a sample, d.
        nfe: Evaluations per sample.

    Raises:
        ValueError: A value is less than 1.
    """
    for name, value in (("numbers", numbers), ("dimensions", dimensions), ("nfe", nfe)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    determined = numbers / dimensions
    train = _multiple(max(LEAST_TRAIN, 256 * determined))
    return Sizes(
        train=min(train, LARGEST_TRAIN),
        validation=2 * MULTIPLE,
        first_batch=max(LEAST_FIRST_BATCH, math.ceil(6 * determined)),
        batch_growth=1.15,
        largest_batch=max(2 * LEAST_TRAIN, _multiple(320 * determined)),
        memory_pairs=max(2, math.ceil(12 / determined)),
        patience=3,
    )


def _multiple(pairs: float) -> int:
    """``pairs`` rounded up to a multiple of MULTIPLE."""
    return MULTIPLE * math.ceil(pairs / MULTIPLE)
