"""Paired bootstrap comparisons of solvers: real differences are detected, and chance differences are not."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.evaluation.bootstrap import compare
from orchestrator.metrics.base import Array
from orchestrator.metrics.psnr import PSNR
from orchestrator.metrics.rmse import RMSE


def _column(values: Array) -> Array:
    return values[:, None]


def test_a_small_difference_shared_by_all_pairs_is_detected() -> None:
    """Solvers are compared on the same noise, so half a dB stands out although samples differ by ten."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(50, 10, 200)
    comparisons = compare(PSNR(), {"a": _column(difficulty), "b": _column(difficulty + rng.normal(0.5, 0.5, 200))})
    (c,) = comparisons
    assert (c.better, c.other, c.count) == ("b", "a", 200)
    assert c.low < 0.5 < c.high
    assert c.low > 0
    assert c.chance == 0


def test_a_chance_difference_is_not_significant() -> None:
    """Two solvers of equal quality: the interval contains zero in about 95 of 100 trials."""
    rng = np.random.default_rng(1)
    contains_zero = 0
    for trial in range(100):
        a, b = rng.normal(50, 5, (2, 100))
        (c,) = compare(PSNR(), {"a": _column(a), "b": _column(b)}, resamples=400, seed=trial)
        contains_zero += c.low <= 0 <= c.high
    assert 88 <= contains_zero <= 100


def test_the_interval_agrees_with_that_of_the_mean() -> None:
    """For means of many samples, it is the normal interval: 1.96 standard errors on both sides."""
    rng = np.random.default_rng(2)
    difference = rng.normal(1, 2, 2000)
    (c,) = compare(PSNR(), {"a": _column(difference), "b": _column(np.zeros(2000))}, resamples=4000)
    half = 1.96 * difference.std(ddof=1) / np.sqrt(2000)
    assert c.low == pytest.approx(difference.mean() - half, abs=0.01)
    assert c.high == pytest.approx(difference.mean() + half, abs=0.01)


def test_the_better_solver_depends_on_the_direction_of_the_metric() -> None:
    """A smaller RMSE wins, so its difference is negative."""
    values = {"near": _column(np.full(10, 0.1)), "far": _column(np.full(10, 0.3))}
    (c,) = compare(RMSE(), values)
    assert (c.better, c.difference, c.chance) == ("near", pytest.approx(-0.2), 0.0)


def test_pairs_that_are_not_finite_for_one_are_left_out_for_both() -> None:
    """Otherwise one solver would be measured on easier samples than the other."""
    a, b = np.array([1.0, np.nan, 3.0, 4.0]), np.array([2.0, 9.0, np.inf, 5.0])
    (c,) = compare(PSNR(), {"a": _column(a), "b": _column(b)})
    assert (c.count, c.difference) == (2, pytest.approx(1.0))


def test_solvers_with_different_sample_counts_are_refused() -> None:
    """Their samples cannot be paired."""
    with pytest.raises(ValueError, match=r"compared on the same samples, but their sample counts are \[3, 4\]"):
        compare(PSNR(), {"a": np.zeros((3, 1)), "b": np.zeros((4, 1))})


def test_a_single_solver_gives_no_comparisons() -> None:
    """The result is an empty list, not an error."""
    assert compare(PSNR(), {"a": np.zeros((3, 1))}) == []
