"""Paired bootstrap that tests whether one solver beats another on samples with the same noise and conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.metrics.base import Array, Metric

RESAMPLES = 2000
AT_ONCE = 100
"""Resamples whose weights are held in memory at the same time."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of two solvers on the same samples.

    Attributes:
        better, other: Names of the two solvers; ``better`` has the better score over all samples.
        difference: Score of ``better`` minus score of ``other``.
        low, high: Bounds of the central 95 % of the difference over resamples.
        chance: Share of resamples in which ``better`` is not better: the bootstrap's one-sided p-value.
        count: Number of samples compared; samples that are not finite for some solver are left out.
    """

    better: str
    other: str
    difference: float
    low: float
    high: float
    chance: float
    count: int


def compare(metric: Metric, values: Mapping[str, Array], resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Compare the best of these solvers with each of the others (Efron and Tibshirani 1993, chapter 16, paired).

    Args:
        metric: A paired metric (:attr:`Metric.paired`).
        values: Per-sample measurements, (N, K), by solver name; the samples and their order are the same for all.
        resamples: Number of resamples; each draws N samples with replacement, the same ones for every solver.
        seed: Seed of the draws.

    Returns:
        One comparison per other solver, the strongest first; empty if there are fewer than two solvers or samples.

    Raises:
        ValueError: The solvers have different numbers of samples.
    """
    counts = {len(rows) for rows in values.values()}
    if len(counts) > 1:
        raise ValueError(f"solvers must be compared on the same samples, but their sample counts are {sorted(counts)}")
    good = np.logical_and.reduce([np.isfinite(rows).all(axis=1) for rows in values.values()])
    finite = {name: rows[good].astype(np.float64) for name, rows in values.items()}
    count = int(good.sum())
    if count < 2 or len(finite) < 2:
        return []
    scores = {name: float(metric.resampled(rows, np.ones((1, count)))[0]) for name, rows in finite.items()}
    sign = 1 if metric.higher_is_better else -1
    best = max(scores, key=lambda name: sign * scores[name])
    drawn = _resampled(metric, finite, count, resamples, seed)
    return [
        Comparison(
            better=best,
            other=other,
            difference=scores[best] - scores[other],
            low=float(np.quantile(drawn[best] - drawn[other], 0.025)),
            high=float(np.quantile(drawn[best] - drawn[other], 0.975)),
            chance=float(np.mean(sign * (drawn[best] - drawn[other]) <= 0)),
            count=count,
        )
        for other in sorted(scores, key=lambda name: -sign * scores[name])
        if other != best
    ]


def _resampled(metric: Metric, values: Mapping[str, Array], count: int, resamples: int, seed: int) -> dict[str, Array]:
    """The score of every solver on every resample, (resamples,) per solver."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Array]] = {name: [] for name in values}
    for first in range(0, resamples, AT_ONCE):
        size = min(AT_ONCE, resamples - first)
        weights = np.zeros((size, count))
        for row in weights:
            row += np.bincount(rng.integers(count, size=count), minlength=count)
        for name, rows in values.items():
            parts[name].append(metric.resampled(rows, weights))
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}
