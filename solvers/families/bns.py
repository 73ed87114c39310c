"""Bespoke non-stationary (BNS) solvers: every number of theta is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families.base import GridSolver, LearnableFamily, sample_preconditioned
from solvers.field import VelocityField
from solvers.ns import NSSolver, nfe_of_flat
from solvers.scale_time import SchedulerChange, precondition
from solvers.schedulers.base import Scheduler
from solvers.to_ns import to_ns


@dataclass(frozen=True)
class BNS(LearnableFamily):
    """All of theta but its first time and first state: n(n+5)/2 - 1 numbers (BNS section 3.2).

    The paper's count n(n+5)/2 + 1 includes t_0 and t_n, which it keeps fixed. The times lie anywhere in the domain:
    ties and any order are allowed, since starts such as RK4 and Heun have them.

    With sigma0 the parameters describe a solver of the preconditioned field (BNS eq. 14) and are folded into
    (T, a, b) on the raw velocity by the scale-time transform.
    """

    source = "Shaul et al. 2024 (BNS), Algorithms 1 and 2"
    label = "BNS"

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        target = _target(scheduler, solver.sigma0)
        return _free(GridSolver(solver.family, solver.nfe, solver.grid).to_ns(target).flat())

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        inner = NSSolver.from_flat(_whole(parameters, _target(scheduler, sigma0)))
        return inner if sigma0 == 1 else to_ns(_Preconditioned(inner, sigma0), scheduler)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        target = _target(scheduler, sigma0)
        n = _nfe(parameters)
        projected = parameters.clone()
        projected[: n - 1] = projected[: n - 1].clamp(target.t_min, _last_time(target))
        return projected


@dataclass(frozen=True)
class _Preconditioned:
    inner: NSSolver
    sigma0: float

    @property
    def nfe(self) -> int:
        return self.inner.nfe

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        return sample_preconditioned(self.inner, velocity, x0, self.sigma0)


def _target(scheduler: Scheduler, sigma0: float) -> Scheduler:
    """The preconditioned scheduler, cut to the domain that ``scheduler`` reaches."""
    return scheduler if sigma0 == 1 else SchedulerChange(scheduler, precondition(scheduler, sigma0)).target


def _last_time(scheduler: Scheduler) -> float:
    """The last time at which the velocity is finite."""
    return min(scheduler.t_max, 1 - 1e-4) if scheduler.velocity_is_singular_at_end else scheduler.t_max


def _nfe(parameters: Tensor) -> int:
    return nfe_of_flat(parameters.shape[0] + 2)


def _free(flat: Tensor) -> Tensor:
    """theta without t_0 and a_0."""
    n = nfe_of_flat(flat.shape[0])
    return torch.cat([flat[1:n], flat[n + 1 :]])


def _whole(parameters: Tensor, scheduler: Scheduler) -> Tensor:
    """theta from its free part: sampling starts at the domain's first time, from sigma(t_min) x0."""
    n = _nfe(parameters)
    first = torch.tensor([scheduler.t_min], dtype=parameters.dtype)
    return torch.cat([first, parameters[: n - 1], scheduler.sigma(scheduler.t_min).reshape(1), parameters[n - 1 :]])


FAMILY = BNS
