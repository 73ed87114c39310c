"""Shared code of learnable families: the preconditioned path, and times parametrised by their steps."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from solvers.families.base import GridSolver
from solvers.ns import NSSolver
from solvers.scale_time import SchedulerChange, on_source, precondition
from solvers.schedulers.base import TIME_TOLERANCE, Scheduler
from solvers.to_ns import LinearSolver, to_ns

END_MARGIN = 1e-4
"""Distance of the last query from t = 1 if the velocity is infinite there."""

LEAST_STEP = 1e-6
"""Least size of a learned step relative to the largest, since a step of length 0 has no multistep weights."""


# ---- the preconditioned path ------------------------------------------------------------------------------------


def target_scheduler(scheduler: Scheduler, sigma0: float) -> Scheduler:
    """The preconditioned scheduler, restricted to the noise levels that ``scheduler`` reaches."""
    return scheduler if sigma0 == 1 else _preconditioning(scheduler, sigma0).target


@lru_cache
def _preconditioning(scheduler: Scheduler, sigma0: float) -> SchedulerChange:
    """The change to the preconditioned path; cached, since learning needs it at every iteration."""
    return SchedulerChange(scheduler, precondition(scheduler, sigma0))


def start_on_target(solver: GridSolver, scheduler: Scheduler) -> NSSolver:
    """``solver`` as an NS solver of the preconditioned field, before it is folded into the raw velocity."""
    bare = GridSolver(solver.family, solver.nfe, solver.grid)
    return bare.to_ns(target_scheduler(scheduler, solver.sigma0))


def on_raw_velocity(inner: LinearSolver, scheduler: Scheduler, sigma0: float) -> NSSolver:
    """Fold a solver of the preconditioned field into (T, a, b) on the raw velocity; differentiable."""
    if sigma0 == 1:
        return inner if isinstance(inner, NSSolver) else to_ns(inner, scheduler)
    change = _preconditioning(scheduler, sigma0)
    return on_source(inner if isinstance(inner, NSSolver) else to_ns(inner, change.target), change)


def last_time(scheduler: Scheduler) -> float:
    """The last time at which the velocity is finite."""
    return min(scheduler.t_max, 1 - END_MARGIN) if scheduler.velocity_is_singular_at_end else scheduler.t_max


def first_state(scheduler: Scheduler) -> Tensor:
    """The weight of x0 in the first state, shape (1,): sigma(t_min), or the scheduler's start_scale."""
    return scheduler.start(scheduler.t_min).reshape(1)


def first_state_at(time: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
    """The weight of x0 at ``time`` of the preconditioned path that is :func:`first_state` on the raw path, (1,)."""
    first = first_state(scheduler)
    if sigma0 == 1:
        return first
    _, scale = _preconditioning(scheduler, sigma0).time_and_scale(time)
    return first * scale


def begins_with(solver: NSSolver, scheduler: Scheduler) -> bool:
    """Whether ``solver`` begins at ``t_min`` from sigma(t_min) x0."""
    sigma = float(first_state(scheduler))
    return abs(float(solver.times[0]) - scheduler.t_min) <= TIME_TOLERANCE and abs(
        float(solver.a[0]) - sigma
    ) <= TIME_TOLERANCE * max(1.0, sigma)


def check_beginning(solver: NSSolver, scheduler: Scheduler, learner: str) -> None:
    """Check that a start has the first query and first state that stay fixed while learning.

    Args:
        solver: Solver of the preconditioned field.
        scheduler: Scheduler of that field.
        learner: Name of the learnable family, for the error.

    Raises:
        ValueError: ``solver`` does not begin at ``t_min`` from sigma(t_min) x0.
    """
    if not begins_with(solver, scheduler):
        first, scale = float(solver.times[0]), float(solver.a[0])
        t_min, sigma = scheduler.t_min, float(first_state(scheduler))
        raise ValueError(
            f"{learner} starts at t={t_min:.6g} from {sigma:.6g} x0, this solver at t={first:.6g} from {scale:.6g} x0; "
            f"start from a solver that begins at the first time of the domain"
        )


# ---- free times -------------------------------------------------------------------------------------------------


def clamp_times(times: Tensor, scheduler: Scheduler) -> Tensor:
    """Clamp query times, in any order, to the interval in which the velocity is finite."""
    return times.clamp(scheduler.t_min, last_time(scheduler))


# ---- rising times, parametrised by the logarithms of their steps ------------------------------------------------


def rising_times(logits: Tensor, scheduler: Scheduler) -> Tensor:
    """Times t_0 < ... < t_m over the whole domain, with steps in proportion to softmax(``logits``).

    Args:
        logits: Shape (m,), float64. Adding a constant to all of them has no effect.

    Returns:
        Shape (m + 1,), float64, from ``t_min`` to ``t_max`` exactly, differentiable.
    """
    first, last = scheduler.t_min, scheduler.t_max
    # The ends are constants, not sums, because a softmax sums to 1 only to rounding.
    ends = torch.tensor([first, last], dtype=logits.dtype)
    between = first + (last - first) * torch.softmax(logits, dim=0).cumsum(0)[:-1]
    return torch.cat([ends[:1], between, ends[1:]])


def step_logits(times: Tensor, scheduler: Scheduler, learner: str) -> Tensor:
    """The inverse of :func:`rising_times`, with mean zero.

    Args:
        times: Shape (m + 1,), float64.
        learner: Name of the learnable family, for the error.

    Raises:
        ValueError: ``times`` do not rise strictly from ``t_min`` to ``t_max``.
    """
    ends = (float(times[0]), float(times[-1]))
    if any(abs(t - end) > TIME_TOLERANCE for t, end in zip(ends, (scheduler.t_min, scheduler.t_max), strict=True)):
        raise ValueError(
            f"{learner} learns times between the ends of the domain, {scheduler.t_min:.6g} and {scheduler.t_max:.6g}, "
            f"but these run from {ends[0]:.6g} to {ends[1]:.6g}; start from a grid over the whole domain"
        )
    steps = times.diff()
    if not bool((steps > 0).all()):
        after = int((steps <= 0).nonzero()[0])
        raise ValueError(
            f"{learner} learns times that rise strictly, but t={float(times[after]):.6g} is followed by "
            f"t={float(times[after + 1]):.6g}; start from a solver and a grid whose times rise"
        )
    logits = torch.log(steps)
    return logits - logits.mean()


def project_step_logits(logits: Tensor, scheduler: Scheduler) -> Tensor:
    """Limit logits so that times stay distinct and the last step begins where the velocity is finite."""
    projected = logits.clamp(min=float(logits.max()) + math.log(LEAST_STEP))
    margin = scheduler.t_max - last_time(scheduler)
    if margin > 0 and len(logits) > 1:
        # Four margins, so that a stage inside the last step keeps its distance from the end too.
        share = 4 * margin / (scheduler.t_max - scheduler.t_min)
        least = torch.logsumexp(projected[:-1], dim=0) + math.log(share / (1 - share))
        projected[-1] = torch.maximum(projected[-1], least)
    return projected
