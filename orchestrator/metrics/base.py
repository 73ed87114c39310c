"""Interface of metrics: per-sample measurements, made shard by shard, and a summary over all shards.

Measuring is the expensive part and runs where the samples are: on hosts for metrics that compare raw samples with
ground truth, in scorers for metrics that need a network of their own. The measurements are small, are stored shard by
shard, and are summarised in the order of the pairs, so no value depends on the number of hosts, scorers or batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.datasets.base import Dataset

Array = npt.NDArray[np.float64]
Media = Literal["samples", "images", "sound"]
"""The form of samples that a metric sees: raw model output, or the decoded image or sound."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples in the form a metric sees.

    Attributes:
        samples: 'samples': (B, \\*shape) as solved, unclipped. 'images': (B, C, H, W), nominally in [-1, 1], unclipped.
            'sound': waves (B, N) in [-1, 1]. All float32, all finite.
        conditions: Conditions drawn from the dataset, (B, ...), int64; None for real data, and for metrics that run on
            a host (``compares``).
        dataset: Source of the conditions; for real data, source of the samples. None for metrics that run on a host.
        reference: Ground truth of the same pairs in the same form; None if the metric does not compare.
        data_range: Largest minus smallest value of the data; 2 for images.
        rate: Sampling rate of sound, in samples per second.
    """

    samples: Tensor
    conditions: npt.NDArray[np.int64] | None
    dataset: Dataset | None
    reference: Tensor | None = None
    data_range: float = 2.0
    rate: int | None = None


@dataclass(frozen=True)
class Summary:
    """The value of a metric over a set of samples.

    Attributes:
        mean: The mean over the finite values, or the value of a metric that is not a mean; NaN if there is none.
        stderr: Standard error of ``mean``; 0 for a single sample, NaN if the metric has none.
        count: Number of samples in the value.
        not_finite: Number of samples left out because the metric was infinite or NaN; reported with the value.
    """

    mean: float
    stderr: float
    count: int
    not_finite: int


@dataclass(frozen=True)
class SplitSummary(Summary):
    """The value of a metric that is the largest of several, such as the error of every coordinate.

    Attributes:
        parts: Name, value and standard error of each.
        over_parts: Their mean.
    """

    parts: tuple[tuple[str, float, float], ...]
    over_parts: float


class Metric(ABC):
    """A metric: per-sample measurements and their summary. The dataclass fields of a subclass are its options.

    Attributes:
        higher_is_better: Direction of improvement.
        name_with_unit: Name in tables and on axes, e.g. "PSNR (dB)"; None: the column itself.
        percent: Whether the value is a share that is shown in percent.
        log_axis: Whether its axis is logarithmic.
        relative_to_truth: Whether tables add the value in percent of ground truth's. For values that are biased by the
            number of samples, only this ratio can be compared between sets of different size.
        compares: Whether it needs ground truth; ground truth itself is then not scored.
        paired: Whether two solvers can be compared pair by pair (:meth:`resampled`).
        needs_all: Whether it has no value if a sample is not finite, since the others are distributed otherwise.
        summary_options: Options that affect only the summary, not the measurements.
        width: K, the measurements per sample, for shards in which no sample is finite.
        fewest: Smallest number of samples, and of real samples, for which it has a value.
    """

    higher_is_better: ClassVar[bool]
    name_with_unit: ClassVar[str | None] = None
    percent: ClassVar[bool] = False
    log_axis: ClassVar[bool] = False
    relative_to_truth: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    paired: ClassVar[bool] = True
    needs_all: ClassVar[bool] = False
    summary_options: ClassVar[frozenset[str]] = frozenset()
    width: ClassVar[int] = 1
    fewest: ClassVar[int] = 1

    @property
    @abstractmethod
    def column(self) -> str:
        """Name of the value in tables, with its unit or the network behind it: ``psnr_db``, ``fid[inception]``."""

    @property
    def sees(self) -> Media:
        """Form of the samples passed to :meth:`measure`."""
        return "samples"

    @property
    def heading(self) -> str:
        """Name and unit of the value as shown: ``PSNR (dB)``, ``wer[digits] (%)``."""
        return f"{self.name_with_unit or self.column}{' (%)' if self.percent else ''}"

    def in_units(self, value: float) -> float:
        """A value, or its standard error, in the units of :attr:`heading`."""
        return 100 * value if self.percent else value

    @property
    def measured(self) -> str:
        """Name of what is measured, without names of files; metrics with equal names and content share measurements."""
        return self.column

    def depends_on(self) -> Iterable[Any]:
        """Everything of the user's that measurements depend on: options, and the content of files that they name.

        Parts are those of :func:`orchestrator.content.digest`.
        """
        return [[f.name, getattr(self, f.name)] for f in fields(self) if f.name not in self.summary_options]  # type: ignore[arg-type]

    def check(self, dataset: Dataset) -> None:  # noqa: B027 (optional: many metrics need no check)
        """Check, before an evaluation starts, that weights and packages are present and the dataset suits the metric.

        Raises:
            ConfigError: Something is missing; the message has its name, the locations searched, and the remedy.
        """

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:  # noqa: B027 (optional: most take any)
        """Check, before samples are measured, that the metric is defined for so many samples of this shape.

        Args:
            shape: Shape of one sample in the form :attr:`sees`.
            count: Number of samples, or of real samples.

        Raises:
            ValueError: It is not; the message names what does not fit, and the remedy.
        """

    @abstractmethod
    def measure(self, batch: Batch) -> Tensor:
        """Measure each sample, shape (B, K), float32 or float64."""

    @abstractmethod
    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        """The value over all samples, in constant memory.

        Args:
            shards: Measurements of the samples, (rows, K) per shard, in the order of the pairs; iterable repeatedly.
            dataset: Source of the samples' conditions.
            real: The same measurements of the real samples of :meth:`real`, or of ground truth of the same pairs if it
                :meth:`compares_with_truth`; otherwise None.
        """

    def real(self, dataset: Dataset) -> Dataset | None:
        """The dataset whose real samples the metric compares with, or None if it needs none measured."""
        return None

    def compares_with_truth(self, dataset: Dataset) -> bool:
        """Whether it compares the distribution of samples with that of ground truth of the same pairs."""
        return False

    def compared_with(self, dataset: Dataset) -> str:
        """What a distance between distributions compares samples with, for people; empty for other metrics."""
        return ""

    def resampled(self, values: Array, weights: Array) -> Array:
        """The value of the metric on bootstrap resamples, shape (R,).

        Args:
            values: Measurements, (N, K), all finite.
            weights: Number of times each sample occurs in each resample, (R, N).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be compared pair by pair")


class MeanMetric(Metric):
    """A metric with one value per sample, K = 1, summarised by the mean over samples."""

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        return summarise(np.concatenate([shard[:, 0] for shard in shards]).tolist())

    def resampled(self, values: Array, weights: Array) -> Array:
        means: Array = weights @ values[:, 0] / weights.sum(axis=1)
        return means


class PairMetric(MeanMetric):
    """A metric that compares each sample with its ground truth."""

    compares = True

    def measure(self, batch: Batch) -> Tensor:
        assert batch.reference is not None
        return self.per_sample(batch.samples, batch.reference, batch.data_range)[:, None]

    @abstractmethod
    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        """The value of the metric for each sample, shape (B,), float64.

        Args:
            samples: Solver output, shape (B, ...), unclipped.
            reference: Ground truth, same shape.
            data_range: Largest minus smallest value of the data.
        """


class RateMetric(Metric):
    """Total errors as a share of total chances for an error; K = 2: (errors, chances) per sample."""

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


EXACT_DB = 300.0
"""PSNR recorded for a solver whose samples are all exact: finite, so that JSON and MLflow can hold it, and beyond the
reach of float64 rounding. Tables show it as ∞."""


def shown_db(value: float, digits: int) -> str:
    """A PSNR with this number of digits, or ∞."""
    return "∞" if value >= EXACT_DB else f"{value:.{digits}f}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard error of per-sample values, summed exactly (independent of their order).

    Values that are not finite are counted and left out. If all are +inf, i.e. every sample is exact, the mean is
    :data:`EXACT_DB`.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    if count == 0 and set(values) == {math.inf}:
        return Summary(EXACT_DB, 0.0, len(values), 0)
    if count == 0:
        return Summary(math.nan, math.nan, 0, len(values))
    mean = math.fsum(finite) / count
    variance = math.fsum((value - mean) ** 2 for value in finite) / max(1, count - 1)
    return Summary(mean, math.sqrt(variance / count), count, len(values) - count)


IMAGE_RANGE = (-1.0, 1.0)
"""Black and white, as metrics take images."""


def to_unit_range(samples: Tensor, limits: tuple[float, float]) -> Tensor:
    """Samples with these two values mapped to -1 and 1, as metrics take images."""
    smallest, largest = limits
    return samples if limits == IMAGE_RANGE else 2 * (samples - smallest) / (largest - smallest) - 1


def check_comparable(samples: Tensor, reference: Tensor) -> None:
    """Refuse samples and reference of different shape.

    Raises:
        ValueError: The shapes differ; the message has both.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}, but ground truth has shape {tuple(reference.shape)}"
        )


OPTIONAL = {
    "texts": "the text of each image",
    "transcripts": "the transcript of each sample",
    "spoken": "the part of each sample that is to be spoken",
    "voices": "a recording of each voice",
}
"""Optional methods of datasets, and what each returns."""


def needs(dataset: Dataset | None, method: str, metric: str) -> Any:
    """An optional method of a dataset that a metric needs.

    Args:
        dataset: The dataset.
        method: Name of the method, one of :data:`OPTIONAL`.
        metric: Name of the metric, for the error message.

    Raises:
        ConfigError: The dataset does not have the method, so the metric has no meaning on it.
    """
    bound = getattr(dataset, method, None)
    if bound is None:
        raise ConfigError(
            f"metric {metric!r} needs {OPTIONAL[method]}, which dataset {type(dataset).__name__} does not provide; "
            f"leave the metric out for this dataset, or choose another dataset"
        )
    return bound
