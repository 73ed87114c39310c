"""Steps for a whole pair set, chosen once on a few of its pairs.

The error that dopri5 estimates along a few pairs shows where the velocity bends. A multistep method on steps that share
this error out evenly takes one evaluation per step and rejects none. It is measured against dopri5's solutions: the
fewest steps whose error is that of the spec's tolerance are kept. At equal error, this takes about half of dopri5's
evaluations (benchmarks/bench_shared_steps.py), and the pairs of a batch do not depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from orchestrator.pairs.accuracy import TIGHTER
from orchestrator.pairs.ground_truth import NotFiniteError, solve, solve_on_steps
from orchestrator.pairs.tolerance import ERROR_PER_TOLERANCE
from solvers.field import CountingField, VelocityField
from solvers.losses import counted, per_sample_mse

SAMPLES = 4
"""Pairs on which steps are chosen by default."""

SPARE = 0.5
"""Largest error on these pairs as a share of :data:`ERROR_PER_TOLERANCE` times the tolerance: other pairs differ."""

FIRST, MOST = 0.25, 0.6
"""Number of steps that are tried first, and the largest that is worth it, as shares of dopri5's evaluations at a tenth
of the tolerance."""

TRIES = 4
"""Numbers of steps that are tried."""


@dataclass(frozen=True, kw_only=True)
class ChosenSteps:
    """Steps for a pair set.

    Attributes:
        steps: t_0..t_n for ``PairSpec.steps``; None if adaptive steps take fewer evaluations.
        error: Geometric mean of the RMS errors of the pairs on them; None if there are none.
        evaluations: Velocity evaluations spent, each of one sample.
    """

    steps: tuple[float, ...] | None
    error: float | None
    evaluations: int


def choose_steps(
    velocity: VelocityField, x0: Tensor, rtol: float, atol: float, *, mask: Tensor | None = None
) -> ChosenSteps:
    """Choose the fewest steps that are as accurate as a tolerance asks, on a few pairs.

    Args:
        velocity: The field of these pairs.
        x0: Their noise, (N, ...).
        rtol, atol: Tolerances of ground truth.
        mask: Which entries count, see :func:`solvers.losses.counted`.

    Raises:
        NotFiniteError: A velocity or the solution is not finite.
    """
    spent = CountingField(velocity)
    truth = solve(spent, x0, rtol / TIGHTER, atol / TIGHTER, keep_errors=True)
    assert truth.errors is not None
    domain = velocity.scheduler.t_min, velocity.scheduler.t_max
    limit = SPARE * ERROR_PER_TOLERANCE * max(rtol, atol)
    count, most = math.ceil(FIRST * truth.nfe), int(MOST * truth.nfe)
    errors: dict[int, float] = {}
    chosen: int | None = None
    while len(errors) < TRIES and count <= most and count not in errors:
        error = errors[count] = _error(spent, x0, truth.x1, even_steps(truth.errors, domain, count), mask)
        if error > limit and chosen is not None:
            break
        if error <= limit and (chosen is None or count < chosen):
            chosen = count
        # The error falls with the fourth power; a little more than that is tried.
        count = math.ceil(count * min(1.6, max(0.6, 1.05 * (error / limit) ** 0.25)))
    evaluations = spent.nfe * len(x0)
    if chosen is None:
        return ChosenSteps(steps=None, error=None, evaluations=evaluations)
    return ChosenSteps(steps=even_steps(truth.errors, domain, chosen), error=errors[chosen], evaluations=evaluations)


def _error(field: VelocityField, x0: Tensor, x1: Tensor, steps: Sequence[float], mask: Tensor | None) -> float:
    """Geometric mean of the samples' RMS errors on these steps; infinite if a solution is not finite."""
    try:
        solved = solve_on_steps(field, x0, steps).x1
    except NotFiniteError:
        return math.inf
    return float(per_sample_mse(counted(solved, mask), counted(x1, mask)).clamp(min=1e-30).log().mean().div(2).exp())


def even_steps(errors: Sequence[tuple[float, float]], domain: tuple[float, float], count: int) -> tuple[float, ...]:
    """``count`` steps that share out the error evenly that dopri5 has estimated along its own.

    Args:
        errors: Ends of dopri5's steps and their errors (``Solution.errors``).
        domain: Begin of the first step, and end of the last.
        count: Number of steps.
    """
    times = np.array([domain[0], *(end for end, _ in errors[:-1]), domain[1]])
    sizes = np.array([size for _, size in errors])
    # dopri5's error over a step grows with its length to the fifth. Steps per unit of time, for an error of 1:
    density = np.log(np.maximum(sizes, 1e-14) ** 0.2 / np.diff(times))
    padded = np.pad(density, 1, mode="edge")
    smooth = np.maximum(density, (padded[:-2] + 2 * density + padded[2:]) / 4)
    position = np.concatenate([[0.0], np.cumsum(np.exp(smooth) * np.diff(times))])
    steps = np.interp(np.linspace(0, position[-1], count + 1), position, times).tolist()
    return (domain[0], *steps[1:-1], domain[1])
