"""Sliced Wasserstein distance between samples and real data, or ground truth: for any kind of sample."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from orchestrator.datasets.base import Dataset
from orchestrator.metrics._features import FeatureMetric
from orchestrator.metrics.base import Array, Summary

RESAMPLES = 20
"""Bootstrap resamples from which the standard error is estimated."""


@dataclass(frozen=True)
class SlicedWasserstein(FeatureMetric):
    """Sliced 2-Wasserstein distance of raw samples (Bonneel et al. 2015), of any number of values.

    The root of the mean, over random directions, of the squared Wasserstein distance between the projections onto a
    direction, which is exact. It has the unit of the data. Between two sets of N samples of one distribution it is not
    0 but falls like 1 / sqrt(N), so compare only values of equal N. The standard error is that of drawing samples, by
    bootstrap; directions are the same in every evaluation.

    Attributes:
        features: 'raw', the values of a sample, or any feature extractor; part of the metric's name.
        projections: Number of directions, uniform on the sphere.
        seed: Seed of the directions.
    """

    features: str = "raw"
    projections: int = 128
    seed: int = 0

    relative_to_truth = True
    falls_back: ClassVar[bool] = True
    summary_options: ClassVar[frozenset[str]] = FeatureMetric.summary_options | {"projections", "seed"}

    def __post_init__(self) -> None:
        if self.projections < 1 or self.seed < 0:
            raise ValueError(f"projections must be at least 1 and seed 0, got {self.projections} and {self.seed}")

    @property
    def column(self) -> str:
        return f"sliced_wasserstein[{self.features}]"

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        mine, theirs = self._projected(shards), self._projected(self.reference_features(real))
        # Ground truth of the same pairs is resampled with them.
        together = self.compares_with_truth(dataset)
        value, *drawn = _distances(mine, theirs, np.random.Generator(np.random.Philox(self.seed)), together)
        return Summary(value, float(np.std(drawn, ddof=1)), len(mine), 0)

    def _projected(self, shards: Iterable[Array]) -> Array:
        """Features projected onto all directions, (N, projections).

        Raises:
            ValueError: A feature is not finite.
        """
        directions: Array | None = None
        parts = []
        for shard in shards:
            if directions is None:
                rng = np.random.Generator(np.random.Philox(self.seed))
                directions = rng.standard_normal((shard.shape[1], self.projections))
                directions /= np.linalg.norm(directions, axis=0)
            parts.append(shard.astype(np.float64) @ directions)
        projected = np.concatenate(parts)
        if not np.isfinite(projected).all():
            raise ValueError("features of some samples are not finite; leave out the solver that made them")
        return projected


def _distances(mine: Array, theirs: Array, rng: np.random.Generator, together: bool) -> list[float]:
    """The distance, then the distance of bootstrap resamples.

    Args:
        mine, theirs: Projections, (N, P) and (M, P).
        rng: Source of the resamples.
        together: Whether row i of both belongs to the same pair, so that both are resampled alike.
    """
    first, second, widths = _coupling(len(mine), len(theirs))
    ones = [np.ones(len(values), dtype=np.int64) for values in (mine, theirs)]
    draws = [ones]
    for _ in range(RESAMPLES):
        counts = [rng.multinomial(len(values), np.full(len(values), 1 / len(values))) for values in (mine, theirs)]
        draws.append([counts[0], counts[0]] if together else counts)
    squares = np.zeros(len(draws))
    for p in range(mine.shape[1]):
        orders = mine[:, p].argsort(), theirs[:, p].argsort()
        a, b = mine[orders[0], p], theirs[orders[1], p]
        for number, counts in enumerate(draws):
            # Repeating sorted values gives the resample in order, without sorting it.
            x, y = (values.repeat(c[order]) for values, c, order in zip((a, b), counts, orders, strict=True))
            squares[number] += float(widths @ (x[first] - y[second]) ** 2)
    return [math.sqrt(square / mine.shape[1]) for square in squares]


def _coupling(n: int, m: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Array]:
    """The monotone coupling of n and m sorted values: indices on both sides, and the mass between each two."""
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m), exact
    return (ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0) / (n * m)


METRIC = SlicedWasserstein
