"""LD3: learns the time grid of a fixed solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from solvers.families._learned import (
    last_time,
    on_raw_velocity,
    project_step_logits,
    rising_times,
    start_on_target,
    step_logits,
    target_scheduler,
)
from solvers.families._named import named_family
from solvers.families.base import Family, GridSolver, LearnableFamily, as_dtype
from solvers.field import VelocityField
from solvers.ns import NSSolver
from solvers.prediction import endpoints_from_velocity
from solvers.schedulers.base import PathPoint, Scheduler
from solvers.to_ns import to_ns

Held = Literal["velocity", "sample", "epsilon"]

WINDOW = 0.5
"""Largest shift of a network time from its solver time, in units of the smallest step (the published setting)."""


@dataclass(frozen=True)
class LD3(LearnableFamily):
    """Learned grid of rising times t_0 < ... < t_m for a fixed solver, as the running sum of a softmax.

    The paper learns either the time or log-SNR in this way. Here it is the time t, because log-SNR is infinite at the
    ends of most paths. The ends are fixed.

    ``decoupled`` learns the network's times separately from the solver's: the k-th query keeps the solver's
    coefficients for the time t_k, but evaluates the network at t_k + delta_k. The first query stays at the start of the
    domain. ``holds`` is the quantity that is carried from the network's time to the solver's. The velocity is the
    default: in (T, a, b) it moves T and leaves a and b unchanged. The published code carries the prediction that its
    solver uses, converted at the network's time: 'sample' for a data-prediction solver such as dpmpp_2m, 'epsilon' for
    a noise-prediction solver.

    Parameters: m logits, one per grid step (their mean has no effect), and if decoupled n - 1 shifts delta_1..
    delta_{n-1}, for the n evaluations that m steps of the inner family make.

    Attributes:
        inner: Module name of the fixed family whose grid is learned.
        inner_options: Its options.
        decoupled: Whether to learn the network's times separately.
        holds: What a decoupled query carries to the solver's time: 'velocity', 'sample' or 'epsilon'.
    """

    inner: str = "dpmpp_2m"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    decoupled: bool = False
    holds: Held = "velocity"
    source = "Tong et al. 2024 (LD3)"

    def __post_init__(self) -> None:
        if not isinstance(self.decoupled, bool):
            raise ValueError(f"decoupled must be true or false, got {self.decoupled!r}")
        if self.holds not in get_args(Held):
            raise ValueError(f"holds must be one of {', '.join(get_args(Held))}, got {self.holds!r}")
        if self.holds != "velocity" and not self.decoupled:
            raise ValueError(f"holds={self.holds!r} has an effect only with decoupled=true; set it, or leave it out")
        named_family(self.inner, self.inner_options)

    @cached_property
    def family(self) -> Family:
        """The family whose grid is learned."""
        return named_family(self.inner, self.inner_options)

    @property
    def starts(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.inner,)

    @property
    def label(self) -> str:
        held = f" {self.holds}" if self.holds != "velocity" else ""
        return f"LD3 {self.family.label}{' decoupled' if self.decoupled else ''}{held}"

    def starts_from(self, family: Family) -> bool:
        return family == self.family

    def freedom(self, nfe: int) -> int:
        return self.family.steps(nfe) - 1 + (nfe - 1 if self.decoupled else 0)

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        if solver.family != self.family:
            raise ValueError(
                f"{self.label} learns the times of {self.family.label} and cannot start from {solver.family.label}; "
                f"start from {self.inner!r} with the options {dict(self.inner_options)}, on any grid, "
                f"or name the start's family as 'inner'"
            )
        target = target_scheduler(scheduler, solver.sigma0)
        # A solver that cannot be run (a query where the velocity is infinite) must fail here, not while learning.
        start_on_target(solver, scheduler)
        logits = step_logits(solver.grid.times(self.family.steps(solver.nfe), target), target, self.label)
        shifts = torch.zeros(solver.nfe - 1 if self.decoupled else 0, dtype=torch.float64)
        return torch.cat([logits, shifts])

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        solver = self._on_times(parameters, target_scheduler(scheduler, sigma0))
        return on_raw_velocity(solver, scheduler, sigma0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        target = target_scheduler(scheduler, sigma0)
        steps, _ = self._counts(parameters)
        logits = project_step_logits(parameters[:steps], target)
        if not self.decoupled:
            return logits
        undisturbed = self._on_times(torch.cat([logits, torch.zeros_like(parameters[steps:])]), target)
        queries = to_ns(undisturbed, target).times[1:]
        window = WINDOW * undisturbed.times.diff().min()
        shifts = parameters[steps:].clamp(-window, window)
        return torch.cat([logits, torch.clamp(shifts, target.t_min - queries, last_time(target) - queries)])

    def _on_times(self, parameters: Tensor, target: Scheduler) -> _OnTimes:
        steps, nfe = self._counts(parameters)
        return _OnTimes(self.family, nfe, rising_times(parameters[:steps], target), parameters[steps:], self.holds)

    def _counts(self, parameters: Tensor) -> tuple[int, int]:
        """(grid steps, evaluations) of a parameter vector.

        Raises:
            ValueError: The length does not match any number of evaluations.
        """
        count = parameters.shape[0]
        # A step takes one evaluation or more, but a family may save some (two-stage methods that end on one stage).
        for nfe in range(1, count * self.family.evaluations_per_step + 1):
            try:
                steps = self.family.steps(nfe)
            except ValueError:
                continue
            if steps + (nfe - 1 if self.decoupled else 0) == count:
                return steps, nfe
        raise ValueError(
            f"{count} numbers are not a parameter vector of {self.label}: it has one parameter per grid step"
            f"{' and one per evaluation after the first' if self.decoupled else ''}"
        )


@dataclass(frozen=True)
class _OnTimes:
    """``family`` on ``times``, with queries moved by ``shifts`` (shape (0,) if not decoupled)."""

    family: Family
    nfe: int
    times: Tensor
    shifts: Tensor
    holds: Held

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        start = velocity.scheduler.start(self.times[0]).to(x0.dtype) * x0
        field = _Shifted(velocity, self.shifts, self.holds) if len(self.shifts) else velocity
        return self.family.integrate(field, start, self.times)


class _Shifted:
    """A field evaluated at other times than the solver uses: the time of query k > 0 is moved by shifts[k-1].

    The result is the velocity at the solver's time that implies the held quantity.
    """

    def __init__(self, field: VelocityField, shifts: Tensor, holds: Held):
        self.field = field
        self.scheduler = field.scheduler
        self.shifts = shifts
        self.holds = holds
        self.queries = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.queries += 1
        if self.queries == 1:
            return self.field(x, t)
        # The clamp only corrects rounding, since project keeps the sum inside the domain.
        moved = (t + self.shifts[self.queries - 2]).clamp(self.scheduler.t_min, self.scheduler.t_max)
        velocity = self.field(x, moved)
        if self.holds == "velocity":
            return velocity
        data, noise = endpoints_from_velocity(velocity, x, self.scheduler(moved))
        at = PathPoint(*(as_dtype(value, x) for value in self.scheduler(t)))
        if self.holds == "sample":
            noise = (x - at.alpha * data) / at.sigma
        else:
            data = (x - at.sigma * noise) / at.alpha
        return at.d_alpha * data + at.d_sigma * noise


FAMILY = LD3
