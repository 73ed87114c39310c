"""How accurate ground truth must be, and the tolerance that gives it: as accurate as needed and no more."""

from __future__ import annotations

import math

MARGIN_DB = 10.0
"""Distance to ground truth's own accuracy below which it decides a solver's PSNR, dB.

At this distance, the error of ground truth may change a solver's RMS error by a third, and its PSNR by 3 dB.
"""

COARSEST, FINEST = 1e-3, 1e-9
"""Range of tolerances that are chosen: a coarser one saves few evaluations, and a finer one is below the rounding of
networks in float32."""

ERROR_PER_TOLERANCE = 8.0
"""RMS error of ground truth as a multiple of its tolerance: that of the shipped models at 1e-4 and 1e-5 or less, but
for speech (benchmarks/bench_ground_truth.py)."""

DB_PER_DECADE = 14.0
"""Least gain of accuracy by a tenth of the tolerance on the shipped models, dB (benchmarks/bench_ground_truth.py)."""


def is_accurate_enough(truth_db: float | None, solver_db: float, margin_db: float = MARGIN_DB) -> bool:
    """Whether the error of ground truth is small enough to measure a solver of this PSNR.

    Args:
        truth_db: PSNR of ground truth itself (:meth:`orchestrator.pairs.accuracy.Accuracy.psnr_db`), dB; None if it
            could not be measured.
        solver_db: PSNR of the solver on these pairs, dB.
        margin_db: Distance that is enough, dB.
    """
    return truth_db is not None and truth_db >= solver_db + margin_db


def next_tolerance(
    tolerance: float, truth_db: float | None, solver_db: float, margin_db: float = MARGIN_DB
) -> float | None:
    """The tolerance for pairs that are not accurate enough at ``tolerance``.

    Args:
        tolerance: Tolerance of the pairs that were measured.
        truth_db, solver_db, margin_db: See :func:`is_accurate_enough`.

    Returns:
        A finer tolerance; None if there is none, because rounding in the network decides the accuracy.
    """
    if truth_db is None:
        return None
    missing = solver_db + margin_db - truth_db
    finer = _allowed(min(tolerance * 10 ** (-missing / DB_PER_DECADE), tolerance / 3))
    return finer if finer < tolerance else None


def _allowed(tolerance: float) -> float:
    """The next finer tolerance 10^k or 3 * 10^k, so that few different pair sets are made; within the limits."""
    exponent = math.floor(math.log10(tolerance) + 1e-9)
    mantissa = 3 if tolerance >= 2.999 * 10.0**exponent else 1
    return min(COARSEST, max(FINEST, float(f"{mantissa}e{exponent}")))
