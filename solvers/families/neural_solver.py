"""Learned multistep weights on learned rising times, the search space of differentiable solver search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families._learned import (
    first_state,
    on_raw_velocity,
    project_step_logits,
    rising_times,
    start_on_target,
    step_logits,
    target_scheduler,
)
from solvers.families.base import GridSolver, LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler


@dataclass(frozen=True)
class NeuralSolver(LearnableFamily):
    """x_{i+1} = x_i + (t_{i+1} - t_i) sum_{j<=i} c_ij u_j with sum_j c_ij = 1: multistep, with every weight learned.

    As a non-stationary solver: the times rise from t_min to t_max, a is constant, and row k of b, which is
    sum_{i<k} (t_{i+1} - t_i) c_i, sums to t_k - t_0. A constant velocity is therefore integrated exactly at all
    parameters.

    The family consists of exactly the solvers with those three properties. Euler, Adams-Bashforth and Midpoint have
    them on every path and grid. RK4 and Heun query one time twice, and exponential integrators have a constant a on
    cond_ot only; these are rejected as starts rather than approximated.

    In the published runs the last two steps of solvers of 6 evaluations and fewer use only one past velocity; here
    every step may use all of them.

    Parameters: n logits, whose softmax gives the steps as shares of the domain, then c_ij for j < i by rows; c_ii is
    1 - sum_{j<i} c_ij. These are n(n+1)/2 numbers, one of which (the logits' mean) has no effect.
    """

    source = "Wang et al. 2025 (Differentiable Solver Search), section 5"
    label = "NeuralSolver"
    starts = ("euler", "adams_bashforth", "midpoint")

    def freedom(self, nfe: int) -> int:
        return nfe * (nfe + 1) // 2 - 1

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        if not self.starts_from(solver.family):
            raise ValueError(
                f"{self.label} cannot equal {solver.family.label}: its times rise strictly, and a step adds velocities "
                f"to the last state with weights that sum to its length; start from {' or '.join(self.starts)}"
            )
        theta = start_on_target(solver, scheduler)
        target = target_scheduler(scheduler, solver.sigma0)
        times = torch.cat([theta.times, torch.tensor([target.t_max], dtype=torch.float64)])
        weights = theta.b.diff(dim=0) / times.diff().unsqueeze(1)
        return torch.cat([step_logits(times, target, self.label), weights[_past(theta.nfe)]])

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        n = _nfe(parameters)
        target = target_scheduler(scheduler, sigma0)
        times = rising_times(parameters[:n], target)
        past = torch.zeros(n, n, dtype=parameters.dtype).index_put(_past(n), parameters[n:])
        weights = past + torch.diag(1 - past.sum(dim=1))
        b = (times.diff().unsqueeze(1) * weights).cumsum(dim=0)
        inner = NSSolver(
            times=times[:-1],
            a=first_state(target).expand(n + 1),
            b=torch.cat([torch.zeros(1, n, dtype=b.dtype), b]),
        )
        return on_raw_velocity(inner, scheduler, sigma0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        n = _nfe(parameters)
        logits = project_step_logits(parameters[:n], target_scheduler(scheduler, sigma0))
        return torch.cat([logits, parameters[n:]])


def _past(n: int) -> tuple[Tensor, Tensor]:
    """Row and column indices of the free weights: c_10; c_20, c_21; ..."""
    rows, columns = torch.tril_indices(n, n, offset=-1)
    return rows, columns


def _nfe(parameters: Tensor) -> int:
    count = parameters.shape[0]
    n = (math.isqrt(1 + 8 * count) - 1) // 2
    if n < 1 or n * (n + 1) // 2 != count:
        raise ValueError(
            f"{count} numbers are not a parameter vector of NeuralSolver: n evaluations have n(n+1)/2 parameters"
        )
    return n


FAMILY = NeuralSolver
