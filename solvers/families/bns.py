"""Bespoke non-stationary (BNS) solvers: every number of theta is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from solvers.families._learned import (
    begins_with,
    check_beginning,
    clamp_times,
    first_state,
    on_raw_velocity,
    project_step_logits,
    rising_times,
    start_on_target,
    step_logits,
    target_scheduler,
)
from solvers.families.base import GridSolver, LearnableFamily
from solvers.ns import InvalidThetaError, NSSolver, nfe_of_flat
from solvers.schedulers.base import Scheduler


@dataclass(frozen=True)
class BNS(LearnableFamily):
    """All of theta but its first time and first state: n(n+5)/2 - 1 numbers (BNS section 3.2).

    The paper's count n(n+5)/2 + 1 includes t_0 and t_n, which it keeps fixed. The times lie anywhere in the domain:
    ties and any order are allowed, since starts such as RK4 and Heun have them. A start that does not begin at t_min
    from sigma(t_min) x0, such as EDM's, brings its own first time and state, and the two are learned as well.

    With sigma0 the parameters describe a solver of the preconditioned field (BNS eq. 14) and are folded into
    (T, a, b) on the raw velocity by the scale-time transform.

    Attributes:
        times: 'free': as above. 'ordered': t_0 < ... < t_{n-1} < t_max by construction, learned through the logarithms
            of the steps in units of the last one; starts with ties or falling times are refused.

    Raises:
        ValueError: Another value of ``times``.
    """

    times: Literal["free", "ordered"] = "free"
    source = "Shaul et al. 2024 (BNS), Algorithms 1 and 2"

    def __post_init__(self) -> None:
        if self.times not in ("free", "ordered"):
            raise ValueError(f"BNS takes times 'free' or 'ordered', got {self.times!r}")

    @property
    def label(self) -> str:
        return "BNS" if self.times == "free" else "BNS (ordered times)"

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        return self.start_from(start_on_target(solver, scheduler), target_scheduler(scheduler, solver.sigma0))

    def start_from(self, solver: NSSolver, scheduler: Scheduler) -> Tensor:
        """Parameters, shape (p,), float64, at which the solver learned on fields of ``scheduler`` is ``solver``.

        Args:
            solver: Any, where times are free.
            scheduler: That of the field ``solver`` acts on: the preconditioned one where sigma0 is not 1.

        Raises:
            ValueError: Times are to be ordered, and those of ``solver`` do not rise from ``t_min``.
        """
        if self.times == "free":
            return _free(solver.flat()) if begins_with(solver, scheduler) else solver.flat()
        check_beginning(solver, scheduler, self.label)
        parameters = _free(solver.flat())
        steps = step_logits(torch.cat([solver.times, _last(scheduler)]), scheduler, "BNS with ordered times")
        return torch.cat([steps[:-1] - steps[-1], parameters[solver.nfe - 1 :]])

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        target = target_scheduler(scheduler, sigma0)
        if _is_whole(parameters):
            return on_raw_velocity(NSSolver.from_flat(parameters), scheduler, sigma0)
        n = _nfe(parameters)
        times = parameters[: n - 1]
        if self.times == "ordered":
            times = rising_times(_with_last_step(times), target)[1:-1]
        inner = NSSolver.from_flat(_whole(torch.cat([times, parameters[n - 1 :]]), target))
        return on_raw_velocity(inner, scheduler, sigma0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        target = target_scheduler(scheduler, sigma0)
        if _is_whole(parameters):
            n = nfe_of_flat(len(parameters))
            return torch.cat([clamp_times(parameters[:n], target), parameters[n:]])
        n = _nfe(parameters)
        times = parameters[: n - 1]
        if self.times == "free":
            times = clamp_times(times, target)
        else:
            steps = project_step_logits(_with_last_step(times), target)
            times = steps[:-1] - steps[-1]
        return torch.cat([times, parameters[n - 1 :]])


def _with_last_step(logits: Tensor) -> Tensor:
    """Logarithms of all n steps in units of the last one, from those of the first n-1."""
    return torch.cat([logits, torch.zeros(1, dtype=logits.dtype)])


def _last(scheduler: Scheduler) -> Tensor:
    return torch.tensor([scheduler.t_max], dtype=torch.float64)


def _nfe(parameters: Tensor) -> int:
    return nfe_of_flat(parameters.shape[0] + 2)


def _is_whole(parameters: Tensor) -> bool:
    """Whether the first time and state are among them: n(n+5)/2 + 1 is n'(n'+5)/2 - 1 for no two n and n'."""
    try:
        nfe_of_flat(len(parameters))
    except InvalidThetaError:
        return False
    return True


def _free(flat: Tensor) -> Tensor:
    """theta without t_0 and a_0."""
    n = nfe_of_flat(flat.shape[0])
    return torch.cat([flat[1:n], flat[n + 1 :]])


def _whole(parameters: Tensor, scheduler: Scheduler) -> Tensor:
    """theta from its free part: sampling starts at the domain's first time, from sigma(t_min) x0."""
    n = _nfe(parameters)
    first = torch.tensor([scheduler.t_min], dtype=parameters.dtype)
    return torch.cat([first, parameters[: n - 1], first_state(scheduler), parameters[n - 1 :]])


FAMILY = BNS
