"""Ground truth is as accurate as needed and no more."""

from __future__ import annotations

from orchestrator.pairs.tolerance import COARSEST, FINEST, is_accurate_enough, next_tolerance


def test_ground_truth_ten_decibels_better_than_a_solver_is_accurate_enough() -> None:
    assert is_accurate_enough(65.0, 55.0)
    assert not is_accurate_enough(64.9, 55.0)
    assert is_accurate_enough(64.9, 55.0, margin_db=9.0)


def test_ground_truth_of_unknown_accuracy_is_not_accurate_enough_and_cannot_be_made_better() -> None:
    """Its tighter solution fails because rounding in the network is larger than the tolerance."""
    assert not is_accurate_enough(None, 20.0)
    assert next_tolerance(1e-7, None, 80.0) is None


def test_the_next_tolerance_is_finer_by_what_is_missing() -> None:
    """Each tenth gains at least 14 dB, so the result is accurate enough at once, and not finer than needed by much."""
    assert next_tolerance(1e-4, 65.0, 58.0) == 3e-5
    assert next_tolerance(1e-4, 65.0, 70.0) == 3e-6
    assert next_tolerance(3e-5, 65.0, 54.9999) == 1e-5


def test_tolerances_end_where_networks_in_float32_round() -> None:
    tolerance: float | None = COARSEST
    visited = []
    while tolerance is not None:
        visited.append(tolerance)
        tolerance = next_tolerance(tolerance, 40.0, 90.0)
    assert visited == sorted(visited, reverse=True)
    assert visited[-1] == FINEST
