"""Whether one solver beats another: a paired bootstrap over samples, which share noise and conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.metrics.base import Array, Metric

RESAMPLES = 2000
AT_ONCE = 100
"""Resamples whose weights are in memory together."""


@dataclass(frozen=True)
class Comparison:
    """One solver against another on the same samples.

    Attributes:
        better, other: Names of the two; ``better`` is so on all samples together.
        difference: The metric of ``better`` less that of ``other``.
        low, high: The middle 95 % of the difference over resamples.
        chance: Share of resamples in which ``better`` is not better: the bootstrap's one-sided p-value.
        count: Samples, those left out that are not finite for either.
    """

    better: str
    other: str
    difference: float
    low: float
    high: float
    chance: float
    count: int


def compare(metric: Metric, values: Mapping[str, Array], resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
    """The best of these solvers against each of the others (Efron and Tibshirani 1993, chapter 16, in pairs).

    Args:
        metric: A metric that is compared pair by pair.
        values: What was measured of every sample, (N, K), by the solver's name; of the same samples in the same order.
        resamples: Sets of N samples that are drawn with replacement, the same for every solver.
        seed: Of the draws.

    Raises:
        ValueError: Numbers of different samples.
    """
    counts = {len(found) for found in values.values()}
    if len(counts) > 1:
        raise ValueError(f"solvers are compared on the same samples, these have {sorted(counts)}")
    good = np.logical_and.reduce([np.isfinite(found).all(axis=1) for found in values.values()])
    finite = {name: found[good].astype(np.float64) for name, found in values.items()}
    count = int(good.sum())
    if count < 2 or len(finite) < 2:
        return []
    whole = {name: float(metric.resampled(found, np.ones((1, count)))[0]) for name, found in finite.items()}
    sign = 1 if metric.higher_is_better else -1
    best = max(whole, key=lambda name: sign * whole[name])
    drawn = _resampled(metric, finite, count, resamples, seed)
    return [
        Comparison(
            better=best,
            other=other,
            difference=whole[best] - whole[other],
            low=float(np.quantile(drawn[best] - drawn[other], 0.025)),
            high=float(np.quantile(drawn[best] - drawn[other], 0.975)),
            chance=float(np.mean(sign * (drawn[best] - drawn[other]) <= 0)),
            count=count,
        )
        for other in sorted(whole, key=lambda name: -sign * whole[name])
        if other != best
    ]


def _resampled(metric: Metric, values: Mapping[str, Array], count: int, resamples: int, seed: int) -> dict[str, Array]:
    """The metric of every solver on every resample."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Array]] = {name: [] for name in values}
    for first in range(0, resamples, AT_ONCE):
        size = min(AT_ONCE, resamples - first)
        weights = np.zeros((size, count))
        for row in weights:
            row += np.bincount(rng.integers(count, size=count), minlength=count)
        for name, found in values.items():
            parts[name].append(metric.resampled(found, weights))
    return {name: np.concatenate(found) for name, found in parts.items()}
