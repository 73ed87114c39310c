"""Increasing functions of one variable: their inverse, and slopes that keep an interpolant increasing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ITERATIONS = 100
"""Bisection alone needs 53 iterations to exhaust float64."""

STUCK = 1e-12
"""Relative distance from the target at which a Newton step of length zero is not convergence."""


def invert_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    low: float,
    high: float,
    guess: Tensor | None = None,
) -> Tensor:
    """Solve f(x) = target for x in [low, high], by Newton's method inside a bisection bracket.

    A target below f(low) or above f(high) gives ``low`` or ``high``; NaN gives NaN.

    Args:
        function: Maps x to (f(x), f'(x)), elementwise, with f strictly increasing; f' may be infinite or zero.
        target: float64, any shape.
        low, high: Ends of the interval.
        guess: Initial x, with the shape of ``target``; default the middle.

    Returns:
        x up to rounding, with the shape of ``target``; its first derivative in ``target`` is 1 / f'(x), and 0 where
        f' is infinite, zero or undefined.
    """
    goal = target.detach()
    with torch.no_grad():
        lower, upper = torch.full_like(goal, low), torch.full_like(goal, high)
        x = (lower + upper) / 2 if guess is None else guess.detach().clamp(low, high)
        for _ in range(MAX_ITERATIONS):
            value, slope = function(x)
            below = value < goal
            lower, upper = torch.where(below, x, lower), torch.where(below, upper, x)
            newton = x - (value - goal) / slope
            # The test is False for NaN too, so an undefined Newton step falls back to bisection. So does a step that
            # does not move x although f(x) is far from the target: the slope is infinite or nearly so.
            stuck = (newton == x) & ((value - goal).abs() > STUCK * (goal.abs() + value.abs()))
            usable = (newton >= lower) & (newton <= upper) & ~stuck
            updated = torch.where(usable, newton, (lower + upper) / 2)
            moved = float((updated - x).abs().max())
            x = updated
            if moved <= 2e-16 * max(abs(low), abs(high)):
                break
        x = torch.where(goal.isnan(), goal, x)
    value, slope = function(x)
    # One more Newton step, with the original target, carries reverse- and forward-mode derivatives to the result. The
    # inverse is flat where the slope is infinite.
    slope = torch.where(slope.isfinite() & (slope > 0), slope, torch.inf).detach()
    return (x + (target - value.detach()) / slope).clamp(low, high)


def limited_slopes(values: Tensor) -> Tensor:
    """Slopes of an increasing sequence with unit spacing, such that its cubic Hermite interpolant increases.

    They are central differences (one-sided and of second order at the two ends), exact for quadratic sequences, and
    limited to three times the smaller neighbouring difference, which is sufficient (Fritsch & Carlson 1980). At the
    ends they are at least a third of the neighbouring difference, so that the interpolant has no flat end.

    Args:
        values: Strictly increasing, shape (n,), n >= 2; differentiable.

    Returns:
        Shape (n,), positive.
    """
    steps = values.diff()
    if len(steps) == 1:
        return torch.cat([steps, steps])
    left, right = steps[:-1], steps[1:]
    inner = torch.minimum((left + right) / 2, 3 * torch.minimum(left, right))
    return torch.cat([_end_slope(steps[:1], left[:1], right[:1]), inner, _end_slope(steps[-1:], right[-1:], left[-1:])])


def _end_slope(step: Tensor, near: Tensor, far: Tensor) -> Tensor:
    one_sided = (3 * near - far) / 2
    return torch.minimum(torch.maximum(one_sided, step / 3), 3 * step)
