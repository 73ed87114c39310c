"""GITS: the best time grid for a solver of few steps, by dynamic programming over a fine grid.

Each Euler step from knot i to knot j of the ground-truth trajectories has a loss, and a grid of n steps is a path from
the first knot to the last. The cost of a grid is the sum of its steps' losses, and dynamic programming computes the
cheapest path exactly. It needs the states and velocities of a few trajectories, and no network evaluations.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["error", "deviation"]


def gits_grid(
    states: Tensor,
    velocities: Tensor,
    times: Tensor,
    steps: int,
    gamma: float = 1.0,
    loss: Loss = "error",
) -> Tensor:
    """The cheapest grid of ``steps`` steps between the knots on these trajectories.

    In this sense it is the best grid for Euler's method, and a candidate for others. A multistep method may do badly on
    it if a very short step is followed by a long one, over which the method extrapolates.

    Args:
        states: x(t) of B trajectories at K knots, shape (K, B, ...), floating point.
        velocities: u_t(x) at the knots, same shape.
        times: Knots, shape (K,), float64, strictly rising from the noise to the data.
        steps: Number of steps of the grid, 1 to K - 1.
        gamma: Weight of every step relative to the one before it (:func:`cheapest_path`). 1 is the plain sum of the
            losses; the published code's default is 1.15, on EDM's polynomial knots.
        loss: Loss of a step (:func:`step_costs`).

    Returns:
        Times of shape (steps + 1,), float64, from ``times[0]`` to ``times[-1]``.

    Raises:
        ValueError: Shapes do not match, the knots do not rise, a number is not finite, the loss is unknown, there are
            more steps than the knots allow, or gamma is not positive.

    Source: Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS). Its time variable
    is the noise level of the variance-exploding path, on which Euler's method is DDIM; on cond_ot it is DDIM too.
    """
    return times[cheapest_path(step_costs(states, velocities, times, loss), steps, gamma)]


def step_costs(states: Tensor, velocities: Tensor, times: Tensor, loss: Loss = "error") -> Tensor:
    """The loss of an Euler step between any two knots, averaged over the trajectories.

    With y_ij = x_i + (t_j - t_i) u_i, the step from i to j costs

    - 'error': ||y_ij - x_j||, its local error in the Euclidean norm;
    - 'deviation': the distance of y_ij from the straight line between the trajectory's ends, minus that of x_j. It
      may be negative. It is the published code's default, and ignores errors along the line.

    Args:
        states, velocities, times: As in :func:`gits_grid`.
        loss: 'error' or 'deviation'.

    Returns:
        Shape (K, K), float64; infinite for j <= i.

    Raises:
        ValueError: As in :func:`gits_grid`.
    """
    if times.ndim != 1 or len(times) < 2 or states.ndim < 2 or len(states) != len(times):
        raise ValueError(
            f"a trajectory has K >= 2 knots: states and velocities (K, B, ...) and times (K,); got "
            f"{tuple(states.shape)}, {tuple(velocities.shape)} and {tuple(times.shape)}"
        )
    if velocities.shape != states.shape:
        raise ValueError(
            f"states of shape {tuple(states.shape)} with velocities of shape {tuple(velocities.shape)}; pass both at "
            f"the same knots"
        )
    if not bool((times.diff() > 0).all()):
        raise ValueError("the knots' times must rise strictly from the noise to the data; sort them and drop repeats")
    if not bool(torch.isfinite(states).all() and torch.isfinite(velocities).all()):
        raise ValueError("states and velocities must be finite; leave out the times at which the velocity is infinite")
    if loss not in ("error", "deviation"):
        raise ValueError(f"unknown loss {loss!r} of a step; choose 'error' or 'deviation'")
    x, u = (
        value.to(torch.float64).flatten(2) if value.ndim > 2 else value.to(torch.float64)[..., None]
        for value in (states, velocities)
    )
    knots = len(times)
    costs = torch.full((knots, knots), math.inf, dtype=torch.float64)
    for i in range(knots - 1):
        step = (times[i + 1 :] - times[i]).to(torch.float64)[:, None, None]
        reached, true = x[i] + step * u[i], x[i + 1 :]
        if loss == "error":
            loss_per_trajectory = (reached - true).norm(dim=-1)
        else:
            loss_per_trajectory = _off_line(reached, x[0], x[-1]) - _off_line(true, x[0], x[-1])
        costs[i, i + 1 :] = loss_per_trajectory.mean(dim=1).cpu()
    return costs


def _off_line(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distance of ``x`` (..., B, d) from the lines through ``first`` and ``last`` (B, d), shape (..., B)."""
    direction = torch.nn.functional.normalize(last - first, dim=-1)
    offset = x - first
    return (offset - (offset * direction).sum(dim=-1, keepdim=True) * direction).norm(dim=-1)


def cheapest_path(costs: Tensor, steps: int, gamma: float = 1.0) -> list[int]:
    """The path 0 = i_0 < i_1 < ... < i_n = K - 1 with the least sum_k gamma^k costs[i_k, i_{k+1}], exactly.

    Solved backwards: V_k(i) = min_j costs[i, j] + gamma V_{k-1}(j) is the least cost of k steps from i to the end. A
    gamma above 1 makes late steps more expensive, and so concentrates the steps near the data.

    Args:
        costs: Shape (K, K); only entries above the diagonal are used. They may have any sign.
        steps: n, from 1 to K - 1.
        gamma: Positive.

    Returns:
        n + 1 indices. Of several equally cheap paths, the first in lexicographic order.

    Raises:
        ValueError: ``steps`` or ``gamma`` is out of range.
    """
    knots = len(costs)
    if not 1 <= steps <= knots - 1:
        raise ValueError(
            f"{knots} knots allow 1 to {knots - 1} steps, got {steps}; give trajectories on a finer grid, or ask for "
            f"fewer steps"
        )
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    forward = torch.ones(knots, knots, dtype=torch.bool).triu(diagonal=1)
    edges = torch.where(forward, costs.to(torch.float64), math.inf)
    least = edges[:, -1]
    choices: list[Tensor] = []
    for _ in range(steps - 1):
        total = edges + gamma * least
        least = total.min(dim=1).values
        choices.append((total == least[:, None]).int().argmax(dim=1))
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, knots - 1]
