"""What a metric is: a number per sample against its ground truth, and a mean that merges exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Metric(ABC):
    """Compares samples with ground truth, one number per sample. A subclass is stateless.

    Attributes:
        column: Name of the value in tables and in MLflow, with its unit.
        higher_is_better: Direction of improvement.
    """

    column: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @abstractmethod
    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        """The metric of each sample, shape (B,), float64.

        Args:
            samples: Solver output, shape (B, ...), unclipped.
            reference: Ground truth, same shape.
            data_range: Largest minus smallest value of the data.
        """


@dataclass(frozen=True)
class Summary:
    """Mean and standard error of a metric over samples.

    Attributes:
        mean: Mean over the finite values.
        stderr: Standard error of the mean; 0 for a single sample.
        count: Samples that the mean is over.
        not_finite: Samples left out because the metric was infinite or NaN: never averaged away in silence.
    """

    mean: float
    stderr: float
    count: int
    not_finite: int


def summarise(values: Tensor) -> Summary:
    """Mean and standard error of per-sample values, summed exactly (independent of order and blocks)."""
    finite = values[torch.isfinite(values)].to(torch.float64).tolist()
    count = len(finite)
    if count == 0:
        return Summary(math.nan, math.nan, 0, len(values))
    mean = math.fsum(finite) / count
    variance = _variance(finite, mean)
    return Summary(mean, math.sqrt(variance / count), count, len(values) - count)


def _variance(values: Iterable[float], mean: float) -> float:
    squares = [(value - mean) ** 2 for value in values]
    return math.fsum(squares) / (len(squares) - 1) if len(squares) > 1 else 0.0


def check_comparable(samples: Tensor, reference: Tensor) -> None:
    """Refuse samples and reference of different shape.

    Raises:
        ValueError: With both shapes.
    """
    if samples.shape != reference.shape:
        raise ValueError(f"samples of shape {tuple(samples.shape)} against {tuple(reference.shape)} of ground truth")
