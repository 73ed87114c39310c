"""Bespoke non-stationary (BNS) solvers: all of theta is learned."""

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
    """Bespoke non-stationary solver: learns n(n+5)/2 - 1 numbers, all of theta but its first time and first state.

    See BNS section 3.2. The paper's count n(n+5)/2 + 1 includes t_0 and t_n, which it keeps fixed. Times may lie
    anywhere in the domain, in any order and with ties, since starts such as RK4 and Heun have ties. For a start that
    does not begin at t_min from sigma(t_min) x0, such as EDM's, its first time and first state are learned too.

    With sigma0 the parameters describe a solver of the preconditioned field (BNS eq. 14), which the scale-time
    transform folds into (T, a, b) on the raw velocity.

    Attributes:
        times: 'free' as described above, or 'ordered': t_0 < ... < t_{n-1} < t_max by construction, learned through
            the logarithms of the steps relative to the last one. 'ordered' rejects starts with ties or decreasing
            times.

    Raises:
        ValueError: Unknown value of ``times``.
    """

    times: Literal["free", "ordered"] = "free"
    source = "Shaul et al. 2024 (BNS), Algorithms 1 and 2"

    def __post_init__(self) -> None:
        if self.times not in ("free", "ordered"):
            raise ValueError(f"BNS takes times 'free' or 'ordered', got {self.times!r}")

    @property
    def label(self) -> str:
        return "BNS" if self.times == "free" else "BNS (ordered times)"

    def freedom(self, nfe: int) -> int:
        return nfe * (nfe + 5) // 2 - 1

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        return self.start_from(start_on_target(solver, scheduler), target_scheduler(scheduler, solver.sigma0))

    def start_from(self, solver: NSSolver, scheduler: Scheduler) -> Tensor:
        """Parameters, shape (p,), float64, at which the family equals ``solver`` on fields of ``scheduler``.

        Args:
            solver: Any solver if times are free; one with rising times if they are ordered.
            scheduler: Scheduler of the field that ``solver`` acts on: the preconditioned one if sigma0 is not 1.

        Raises:
            ValueError: Times are ordered, and those of ``solver`` do not rise from ``t_min``.
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
    """Append 0, the logarithm of the last step in its own units, to the logarithms of the first n-1 steps."""
    return torch.cat([logits, torch.zeros(1, dtype=logits.dtype)])


def _last(scheduler: Scheduler) -> Tensor:
    return torch.tensor([scheduler.t_max], dtype=torch.float64)


def _nfe(parameters: Tensor) -> int:
    return nfe_of_flat(parameters.shape[0] + 2)


def _is_whole(parameters: Tensor) -> bool:
    """Whether the parameters include the first time and state.

    The length decides: n(n+5)/2 + 1 never equals n'(n'+5)/2 - 1.
    """
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
    """theta from its free part, with the first time t_min and the first state sigma(t_min) x0."""
    n = _nfe(parameters)
    first = torch.tensor([scheduler.t_min], dtype=parameters.dtype)
    return torch.cat([first, parameters[: n - 1], first_state(scheduler), parameters[n - 1 :]])


FAMILY = BNS
