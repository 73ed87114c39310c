"""Bespoke non-stationary (BNS) solvers: all of theta is learned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from solvers.families._learned import (
    begins_with,
    check_beginning,
    clamp_times,
    first_state,
    first_state_at,
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

Beginning = Literal["held", "time", "free"]

LEFT_OUT: dict[Beginning, int] = {"held": 2, "time": 1, "free": 0}
"""How many of t_0 and a_0 are not learned."""

SKIPPED = 0.05
"""Share of the domain that a start leaves to the exact flow from pure noise, if its first time is learned.

Larger shares end in worse solvers at 8 evaluations, and smaller ones do at 4 and 6 where the velocity is rough near the
noise (``benchmarks/bench_beginning.py``)."""

SKIPPED_BY_FEW, FEW = 0.2, 3
"""The same at ``FEW`` evaluations and fewer, whose learned first times lie at a fourth of the domain."""

LEAST_START = 0.1
"""Least learned weight of x0 in the first state, as a share of the usual one: pipelines take no negative weight."""


@dataclass(frozen=True)
class BNS(LearnableFamily):
    """Bespoke non-stationary solver: learns n(n+5)/2 - 1 numbers, all of theta but its first time and first state.

    See BNS section 3.2. The paper's count n(n+5)/2 + 1 includes t_0 and t_n, which it keeps fixed. Times may lie
    anywhere in the domain, in any order and with ties, since starts such as RK4 and Heun have ties.

    With sigma0 the parameters describe a solver of the preconditioned field (BNS eq. 14), which the scale-time
    transform folds into (T, a, b) on the raw velocity.

    Attributes:
        times: 'free' as described above, or 'ordered': t_0 < ... < t_{n-1} < t_max by construction, learned through
            the logarithms of the steps relative to the last one. 'ordered' rejects starts with ties or decreasing
            times.
        beginning: Whether the first time t_0 and the weight a_0 of the first state are learned as well. 'held' keeps
            t_min and sigma(t_min), and learns both only for a start that begins elsewhere, such as EDM's. 'time' learns
            t_0 and keeps a_0, for pipelines that hand their noise to the network unscaled. 'free' learns both.
            Otherwise than with 'held', a start that begins at t_min is squeezed into the times after it
            (:func:`squeezed`), since the first velocity of a path from pure noise holds almost no information.

    Raises:
        ValueError: Unknown value of ``times`` or ``beginning``, or both are set: ordered times begin at t_min.
    """

    times: Literal["free", "ordered"] = "free"
    beginning: Beginning = "held"
    source = "Shaul et al. 2024 (BNS), Algorithms 1 and 2"

    def __post_init__(self) -> None:
        if self.times not in ("free", "ordered"):
            raise ValueError(f"BNS takes times 'free' or 'ordered', got {self.times!r}")
        if self.beginning not in LEFT_OUT:
            raise ValueError(f"BNS takes beginning 'held', 'time' or 'free', got {self.beginning!r}")
        if self.times == "ordered" and self.beginning != "held":
            raise ValueError(
                f"BNS with ordered times begins at t_min, but beginning is {self.beginning!r}; set it to 'held', or "
                f"times to 'free'"
            )

    @property
    def label(self) -> str:
        if self.beginning != "held":
            return "BNS, free beginning" if self.beginning == "free" else "BNS, free first time"
        return "BNS" if self.times == "free" else "BNS (ordered times)"

    @property
    def start_format(self) -> int:
        return 1 if self.beginning == "held" else 2  # 2: starts are squeezed into the times after the noise

    def freedom(self, nfe: int) -> int:
        return _size(nfe) - LEFT_OUT[self.beginning]

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        return self.start_from(start_on_target(solver, scheduler), target_scheduler(scheduler, solver.sigma0))

    def start_from(self, solver: NSSolver, scheduler: Scheduler) -> Tensor:
        """Parameters, shape (p,), float64, at which the family equals ``solver`` on fields of ``scheduler``.

        Args:
            solver: Any solver if times are free; one with rising times if they are ordered.
            scheduler: Scheduler of the field that ``solver`` acts on: the preconditioned one if sigma0 is not 1.

        Raises:
            ValueError: Times are ordered, and those of ``solver`` do not rise from ``t_min``; or ``beginning`` is
                'time', and ``solver`` begins elsewhere.
        """
        at_beginning = begins_with(solver, scheduler)
        if self.beginning == "time" or self.times == "ordered":
            check_beginning(solver, scheduler, self.label)
        if self.beginning == "free":
            return (squeezed(solver, scheduler) if at_beginning else solver).flat()
        if self.beginning == "time":
            return _without(squeezed(solver, scheduler).flat(), solver.nfe)
        if self.times == "free":
            return _free(solver.flat()) if at_beginning else solver.flat()
        parameters = _free(solver.flat())
        steps = step_logits(torch.cat([solver.times, _last(scheduler)]), scheduler, "BNS with ordered times")
        return torch.cat([steps[:-1] - steps[-1], parameters[solver.nfe - 1 :]])

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        target = target_scheduler(scheduler, sigma0)
        n, left_out = _form(parameters)
        if left_out == 2 and self.times == "ordered":
            times = rising_times(_with_last_step(parameters[: n - 1]), target)[1:-1]
            parameters = torch.cat([times, parameters[n - 1 :]])
        whole = _whole(parameters, target, lambda first: first_state_at(first, scheduler, sigma0))
        return on_raw_velocity(NSSolver.from_flat(whole), scheduler, sigma0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        target = target_scheduler(scheduler, sigma0)
        n, left_out = _form(parameters)
        count = n - 1 if left_out == 2 else n
        times = parameters[:count]
        if self.times == "free" or left_out < 2:
            times = clamp_times(times, target)
        else:
            steps = project_step_logits(_with_last_step(times), target)
            times = steps[:-1] - steps[-1]
        if left_out:
            return torch.cat([times, parameters[count:]])
        least = LEAST_START * first_state(target)
        return torch.cat([times, torch.maximum(parameters[n : n + 1], least), parameters[n + 1 :]])


def _with_last_step(logits: Tensor) -> Tensor:
    """Append 0, the logarithm of the last step in its own units, to the logarithms of the first n-1 steps."""
    return torch.cat([logits, torch.zeros(1, dtype=logits.dtype)])


def _last(scheduler: Scheduler) -> Tensor:
    return torch.tensor([scheduler.t_max], dtype=torch.float64)


def _size(nfe: int) -> int:
    """Number of entries of flat theta."""
    return nfe * (nfe + 5) // 2 + 1


def _form(parameters: Tensor) -> tuple[int, int]:
    """The NFE, and how many of the two numbers of the beginning are left out: none, a_0, or both.

    The length decides, since flat thetas of n and n + 1 evaluations differ by at least four entries.

    Raises:
        InvalidThetaError: The length belongs to no NFE.
    """
    for left_out in (0, 1, 2):
        with suppress(InvalidThetaError):
            return nfe_of_flat(len(parameters) + left_out), left_out
    raise InvalidThetaError(f"BNS cannot have {len(parameters)} parameters: n evaluations have n(n+5)/2 - 1 to + 1")


def _free(flat: Tensor) -> Tensor:
    """theta without t_0 and a_0."""
    return _without(flat, nfe_of_flat(len(flat)))[1:]


def _without(flat: Tensor, index: int) -> Tensor:
    return torch.cat([flat[:index], flat[index + 1 :]])


def _whole(parameters: Tensor, scheduler: Scheduler, start_at: Callable[[Tensor], Tensor]) -> Tensor:
    """Flat theta, with the first time t_min and the first state where ``parameters`` leave them out.

    Args:
        parameters: As learned.
        scheduler: Scheduler of the preconditioned field.
        start_at: The weight of x0 in the first state at a learned first time, shape (1,).
    """
    n, left_out = _form(parameters)
    if not left_out:
        return parameters
    if left_out == 1:
        return torch.cat([parameters[:n], start_at(parameters[0]), parameters[n:]])
    first = torch.tensor([scheduler.t_min], dtype=parameters.dtype)
    return torch.cat([first, parameters[: n - 1], first_state(scheduler), parameters[n - 1 :]])


def squeezed(solver: NSSolver, scheduler: Scheduler) -> NSSolver:
    """``solver`` on the times from t_0 on, a little inside the domain, after the flow from pure noise to t_0.

    The flow is taken as sigma(t_0) x0, which is exact for data of mean and variance 0; a variance v changes the weight
    by a factor 1 + v snr(t_0)^2 / 2, at most about 1 %. Every step is shortened by the same factor.
    """
    share = 1 - (SKIPPED_BY_FEW if solver.nfe <= FEW else SKIPPED)
    times = scheduler.t_max - share * (scheduler.t_max - solver.times)
    return NSSolver(times, solver.a + scheduler.start(times[0]) - first_state(scheduler), share * solver.b)


FAMILY = BNS
