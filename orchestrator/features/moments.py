"""Mean and covariance of features, accumulated exactly, and the Frechet distance between two sets."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save
from torch import Tensor
from torch_fidelity.metric_fid import (  # type: ignore[import-untyped]
    KEY_METRIC_FID,
    fid_statistics_to_metric,
)

from orchestrator.errors import ConfigError
from orchestrator.features.base import FeatureExtractor
from orchestrator.files import data_files

Array = npt.NDArray[np.float64]

WEIGHTS = Path(__file__).parent / "weights"
LARGEST = 64.0
"""Upper bound of a feature's magnitude. Rounded to multiples of 2^-24 a feature has 30 bits, so sums are exact."""

MAX_COUNT = 2**23
"""Largest number of samples for which sums of 30-bit products fit the 53 bits of float64."""

BATCH = 1024
"""Samples per pass through an extractor."""


@dataclass(frozen=True)
class Moments:
    """Moments of a set of features, as a Frechet distance needs them.

    Attributes:
        features: Name of the extractor.
        count: Number of samples.
        mean: Shape (F,), float64.
        covariance: Shape (F, F), float64, normalised by count - 1.
        samples: Features of some of the samples, (M, F), float32, for kernel distances; None if none were kept.
    """

    features: str
    count: int
    mean: Array
    covariance: Array
    samples: npt.NDArray[np.float32] | None = None

    def to_bytes(self, **facts: str) -> bytes:
        """Serialise to a safetensors file; ``facts`` are stored in its metadata for human readers."""
        described = {"features": self.features, "count": self.count, **facts}
        tensors: dict[str, npt.NDArray[Any]] = {"mean": self.mean, "covariance": self.covariance}
        if self.samples is not None:
            # float16 halves the bytes, and the noise of kernel distances is far above its rounding.
            tensors["samples"] = self.samples.astype(np.float16)
        return save(tensors, {"bespoke_moments": json.dumps(described)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """The inverse of :meth:`to_bytes`, except that samples were rounded to 16 bits.

        Raises:
            ValueError, KeyError: ``data`` is not such a file.
        """
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header["__metadata__"]["bespoke_moments"])
        tensors = load(data)
        samples = tensors["samples"].astype(np.float32) if "samples" in tensors else None
        return cls(described["features"], int(described["count"]), tensors["mean"], tensors["covariance"], samples)


class FeatureStatistics:
    """Sums over features whose bits do not depend on order, batches or shards.

    A feature is rounded to a multiple of 2^-24 (at or above 1, float32 has no finer digits) and split into a high and
    a low half of 15 bits. Products of halves are integer multiples of a power of two, and the sum of up to
    :data:`MAX_COUNT` of them fits the 53 bits of a float64, so no addition rounds.

    Attributes:
        features: Name of the extractor.
        unit: Power of two by which features are divided before they are rounded; moments are of the features as given.
        count: Samples so far.
    """

    def __init__(self, features: str, dim: int, unit: float = 1.0):
        self.features, self.unit = features, unit
        self.count = 0
        self._sums = np.zeros((2, dim))
        self._products = np.zeros((3, dim, dim))

    def add(self, features: Tensor | npt.NDArray[Any]) -> None:
        """Add the features of a batch, shape (B, F).

        Raises:
            ValueError: The number of features differs, a value is not finite or too large, or there are too many
                samples.
        """
        dim = self._sums.shape[1]
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features of {self.features} are (B, {dim}), got {tuple(features.shape)}")
        values = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
        values = values.astype(np.float64) / self.unit
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"features of {int((~finite).sum())} of {len(values)} samples are not finite; leave out the "
                f"solver that made them"
            )
        if np.abs(values).max(initial=0.0) >= LARGEST:
            raise ValueError(
                f"a feature of {self.features} is {np.abs(values).max():g}, above {LARGEST:g}: sums would not be "
                f"exact; scale the extractor's features down"
            )
        if self.count + len(values) > MAX_COUNT:
            raise ValueError(f"statistics of more than {MAX_COUNT:,} samples would not be exact; use fewer samples")
        rounded = np.round(values * 2.0**24) / 2.0**24
        high = np.round(rounded * 2.0**9) / 2.0**9
        low = rounded - high
        self.count += len(values)
        self._sums += np.stack([high.sum(axis=0), low.sum(axis=0)])
        self._products += np.stack([high.T @ high, high.T @ low, low.T @ low])

    def moments(self, at_least: int | None = None) -> Moments:
        """Mean and covariance of all samples added so far.

        Args:
            at_least: Smallest number of samples; by default one more than the number of features.

        Raises:
            ValueError: There are fewer samples. If they do not outnumber the features, the covariance is singular
                and a distance is dominated by bias.
        """
        dim = self._sums.shape[1]
        fewest = dim + 1 if at_least is None else at_least
        if self.count < fewest:
            raise ValueError(
                f"{self.count} samples do not determine the covariance of {dim} features; use at least {fewest}, "
                f"preferably ten times as many as features"
            )
        high, mixed, low = self._products
        mean = self._sums.sum(axis=0) / self.count
        covariance = (high + (mixed + mixed.T) + low - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(self.features, self.count, mean * self.unit, covariance * self.unit**2)


def unit_of(largest: float) -> float:
    """The power of two that brings features of this largest magnitude to between 16 and 32, for their statistics."""
    return 2.0 ** (math.frexp(largest)[1] - 5) if 0 < largest < math.inf else 1.0


def feature_moments(extractor: FeatureExtractor, samples: Tensor, keep: int = 0) -> Moments:
    """Moments of the features of ``samples``, shape (N, ...), in batches of :data:`BATCH`.

    Args:
        extractor: The network.
        samples: (N, ...).
        keep: Number of samples, evenly spread, whose features are kept in ``Moments.samples``.

    Raises:
        ValueError: See :meth:`FeatureStatistics.add` and :meth:`FeatureStatistics.moments`.
    """
    statistics = FeatureStatistics(extractor.name, extractor.dim(tuple(samples.shape[1:])))
    for first in range(0, len(samples), BATCH):
        statistics.add(extractor(samples[first : first + BATCH]))
    moments = statistics.moments()
    if not keep:
        return moments
    chosen = samples[spread(len(samples), keep)]
    parts = [extractor(chosen[i : i + BATCH]).detach().cpu() for i in range(0, len(chosen), BATCH)]
    return replace(moments, samples=torch.cat(parts).float().numpy())


def spread(count: int, keep: int) -> list[int]:
    """Indices of at most ``keep`` of ``count`` samples, evenly spread and in order."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, keep))})


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017), by torch-fidelity's function.

    Raises:
        ValueError: ``a`` and ``b`` are of different features, or numbers of them.
    """
    if a.features != b.features:
        raise ValueError(f"a Frechet distance between features {a.features!r} and {b.features!r} means nothing")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a Frechet distance between {len(a.mean)} and {len(b.mean)} features means nothing")
    pair = ({"mu": moments.mean, "sigma": moments.covariance} for moments in (a, b))
    metrics: dict[str, Any] = fid_statistics_to_metric(*pair, verbose=False)
    return float(metrics[KEY_METRIC_FID])


def reference_moments(features: str, dataset: str) -> Moments:
    """Moments of real data that ship with the package.

    Args:
        features: Name of the extractor.
        dataset: Name of the dataset plugin.

    Raises:
        ConfigError: None exist for this extractor and data set; the message lists those that do.
    """
    path = WEIGHTS / f"{features}.{dataset}.safetensors"
    if not path.is_file():
        known = ", ".join(file.stem for file in data_files(WEIGHTS, [".safetensors"], below=False) if "." in file.stem)
        raise ConfigError(f"no reference statistics {features}.{dataset}; there are: {known}")
    return Moments.from_bytes(path.read_bytes())
