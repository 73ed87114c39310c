"""What a metric is: numbers measured of every sample, shard by shard, and a summary over all shards.

Measuring is the expensive part and is done where the samples are: on the hosts for what compares raw samples with
ground truth, in scorers for what needs a network of its own. What it leaves is small, is stored shard by shard, and is
summarised in the order of the pairs: no number depends on how many hosts, scorers or batches there were.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.datasets.base import Dataset

Array = npt.NDArray[np.float64]
Media = Literal["samples", "images", "sound"]
"""What of a sample a metric sees: the model's own numbers, the image or the sound that they stand for."""


@dataclass(frozen=True)
class Batch:
    """Some samples, as a metric sees them.

    Attributes:
        samples: 'samples': (B, \\*shape) as solved, unclipped. 'images': (B, C, H, W), nominally in [-1, 1], unclipped.
            'sound': waves (B, N) in [-1, 1]. All float32, all finite.
        conditions: What the dataset drew for them, (B, ...), int64; None for real data.
        dataset: Where their conditioning is from (for real data: where they are from).
        reference: Ground truth of the same pairs in the same form; None where the metric does not compare.
        data_range: Largest minus smallest value that 'samples' have; 2 for images.
        rate: Of sound: samples a second.
    """

    samples: Tensor
    conditions: npt.NDArray[np.int64] | None
    dataset: Dataset
    reference: Tensor | None = None
    data_range: float = 2.0
    rate: int | None = None


@dataclass(frozen=True)
class Summary:
    """A metric over samples.

    Attributes:
        mean: The mean over the finite values, or what else the metric is; NaN where there is none.
        stderr: Its standard error; 0 for a single sample, NaN where the metric has none.
        count: Samples that it is over.
        not_finite: Samples left out because the metric was infinite or NaN: never averaged away in silence.
    """

    mean: float
    stderr: float
    count: int
    not_finite: int


class Metric(ABC):
    """Numbers of every sample and their summary. A subclass's dataclass fields are its options.

    Attributes:
        higher_is_better: Direction of improvement.
        sees: What of a sample it is given.
        compares: Whether it needs ground truth; ground truth itself is then not scored.
        paired: Whether summaries of two solvers can be compared pair by pair (:meth:`resampled`).
        summary_options: Options that only the summary depends on, not what is measured of a sample.
        width: K where it is known: what is kept of a shard in which no sample is finite.
    """

    higher_is_better: ClassVar[bool]
    sees: ClassVar[Media] = "samples"
    compares: ClassVar[bool] = False
    paired: ClassVar[bool] = True
    summary_options: ClassVar[frozenset[str]] = frozenset()
    width: ClassVar[int] = 1

    @property
    @abstractmethod
    def column(self) -> str:
        """Name of the value in tables, with its unit or the network behind it: ``psnr_db``, ``fid[inception]``."""

    @property
    def measured(self) -> str:
        """Name of what :meth:`measure` gives. Metrics with the same name share it; it names the network, if any."""
        return self.column

    def check(self, dataset: Dataset) -> None:  # noqa: B027 (optional: many need nothing)
        """Refuse what cannot work before anything starts: missing weights or packages, a dataset that lacks something.

        Raises:
            ConfigError: Naming what is missing, where it was looked for, and the remedy.
        """

    @abstractmethod
    def measure(self, batch: Batch) -> Tensor:
        """The numbers of each sample, shape (B, K), float32 or float64."""

    @abstractmethod
    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        """The value over all samples, in constant memory.

        Args:
            shards: Numbers of the samples, (rows, K) each, in the order of the pairs. Can be gone through again.
            dataset: Where their conditioning is from.
            real: The same numbers of the real samples of :meth:`real`, where that is not None.
        """

    def real(self, dataset: Dataset) -> Dataset | None:
        """The dataset whose real samples have to be measured too, or None."""
        return None

    def resampled(self, values: Array, weights: Array) -> Array:
        """The metric of bootstrap resamples, shape (R,).

        Args:
            values: (N, K), all finite.
            weights: How often each sample is in each resample, (R, N).
        """
        raise NotImplementedError(f"{type(self).__name__} is not compared pair by pair")


class MeanMetric(Metric):
    """One number a sample, K = 1, and its mean over samples."""

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        return summarise(torch.from_numpy(np.concatenate([shard[:, 0] for shard in shards])))

    def resampled(self, values: Array, weights: Array) -> Array:
        means: Array = weights @ values[:, 0] / weights.sum(axis=1)
        return means


class PairMetric(MeanMetric):
    """A number for a sample and its ground truth."""

    compares = True

    def measure(self, batch: Batch) -> Tensor:
        assert batch.reference is not None
        return self.per_sample(batch.samples, batch.reference, batch.data_range)[:, None]

    @abstractmethod
    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        """The metric of each sample, shape (B,), float64.

        Args:
            samples: Solver output, shape (B, ...), unclipped.
            reference: Ground truth, same shape.
            data_range: Largest minus smallest value of the data.
        """


class RateMetric(Metric):
    """Errors of all samples as a share of all chances for one, K = 2: (errors, chances) of each sample."""

    width = 2

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        """The share; its standard error is that of a ratio estimator, to first order (Cochran 1977, 6.13)."""
        values = np.concatenate(list(shards))
        finite = values[np.isfinite(values).all(axis=1)]
        errors, chances = math.fsum(finite[:, 0]), math.fsum(finite[:, 1])
        if not chances:
            return Summary(math.nan, math.nan, 0, len(values) - len(finite))
        rate, count = errors / chances, len(finite)
        spread = math.fsum((finite[:, 0] - rate * finite[:, 1]) ** 2)
        stderr = math.sqrt(spread / (count - 1) * count) / chances if count > 1 else 0.0
        return Summary(rate, stderr, count, len(values) - count)

    def resampled(self, values: Array, weights: Array) -> Array:
        sums = weights @ values
        rates: Array = sums[:, 0] / sums[:, 1]
        return rates


def summarise(values: Tensor) -> Summary:
    """Mean and standard error of per-sample values, summed exactly (independent of order and blocks)."""
    return summarise_values(values.to(torch.float64).tolist())


def summarise_values(values: Sequence[float]) -> Summary:
    """The same of plain numbers."""
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    if count == 0:
        return Summary(math.nan, math.nan, 0, len(values))
    mean = math.fsum(finite) / count
    variance = _variance(finite, mean)
    return Summary(mean, math.sqrt(variance / count), count, len(values) - count)


def _variance(values: Sequence[float], mean: float) -> float:
    squares = [(value - mean) ** 2 for value in values]
    return math.fsum(squares) / (len(squares) - 1) if len(squares) > 1 else 0.0


def check_comparable(samples: Tensor, reference: Tensor) -> None:
    """Refuse samples and reference of different shape.

    Raises:
        ValueError: With both shapes.
    """
    if samples.shape != reference.shape:
        raise ValueError(f"samples of shape {tuple(samples.shape)} against {tuple(reference.shape)} of ground truth")


def needs(dataset: Dataset, method: str, metric: str, what: str) -> Any:
    """A dataset's optional method.

    Raises:
        ConfigError: The dataset has none: the metric has no meaning on it.
    """
    found = getattr(dataset, method, None)
    if found is None:
        raise ConfigError(
            f"metric {metric!r} needs {what}, and dataset {type(dataset).__name__} has none; leave the metric out for "
            f"it, or take another dataset"
        )
    return found
