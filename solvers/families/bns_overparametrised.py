"""BNS before its reduction: every state is a learned combination of all states and velocities before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families._learned import (
    check_beginning,
    clamp_times,
    first_state,
    on_raw_velocity,
    start_on_target,
    target_scheduler,
)
from solvers.families.base import GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler


@dataclass(frozen=True)
class OverparametrisedBNS(LearnableFamily):
    """x_{i+1} = sum_j c_ij x_j + sum_j d_ij u_j over all j <= i: the naive form of BNS (BNS eq. 10).

    It describes the same solvers as BNS with more parameters: n(n+1) weights and n-1 times, n^2 + 2n - 1 in total, of
    which n(n+5)/2 - 1 matter. Gradient descent takes another path: a weight d_ij moves every later state that is built
    on x_{i+1}, while BNS's b_ij moves x_{i+1} alone. It therefore needs a smaller learning rate.

    A start is written with c_ii = 1, in the usual form x_{i+1} = x_i + ...; if a changes, c_i0 carries the change.
    Parameters: t_1..t_{n-1}, then c by rows (c_00; c_10, c_11; ...), then d by rows.
    """

    source = "Shaul et al. 2024 (BNS), eq. 10 and 32 (corrected)"
    label = "BNS (c, d)"

    def freedom(self, nfe: int) -> int:
        return BNS().freedom(nfe)

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        theta = start_on_target(solver, scheduler)
        check_beginning(theta, target_scheduler(scheduler, solver.sigma0), self.label)
        n = theta.nfe
        c = torch.eye(n, dtype=torch.float64)
        c[:, 0] += theta.a.diff() / theta.a[0]
        rows, columns = _triangle(n)
        return torch.cat([theta.times[1:], c[rows, columns], theta.b.diff(dim=0)[rows, columns]])

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        n = _nfe(parameters)
        target = target_scheduler(scheduler, sigma0)
        first = torch.tensor([target.t_min], dtype=parameters.dtype)
        rows, columns = _triangle(n)
        c, d = (
            torch.zeros(n, n, dtype=parameters.dtype).index_put((rows, columns), weights)
            for weights in parameters[n - 1 :].chunk(2)
        )
        a, b = reduce_update_rules(c, d, first_state(target))
        inner = NSSolver(times=torch.cat([first, parameters[: n - 1]]), a=a, b=b)
        return on_raw_velocity(inner, scheduler, sigma0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        n = _nfe(parameters)
        times = clamp_times(parameters[: n - 1], target_scheduler(scheduler, sigma0))
        return torch.cat([times, parameters[n - 1 :]])


def reduce_update_rules(c: Tensor, d: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the solver x_{i+1} = sum_j c_ij x_j + sum_j d_ij u_j, where x_0 is ``a0`` times the noise.

    BNS eq. 32, corrected: a_{k+1} = sum_{j<=k} c_kj a_j, whereas the paper pairs (c_k)_j with the weight of x_{j+1}
    instead of x_j. The same recursion on the rows of b, plus d, gives b.

    Args:
        c: Weights of the states, shape (n, n), lower triangular with its diagonal.
        d: Weights of the velocities, same shape.
        a0: Weight of the noise in the first state, shape (1,).

    Returns:
        a of shape (n+1,) and b of shape (n+1, n), as in :class:`solvers.ns.NSSolver`; differentiable in c and d.
    """
    n = c.shape[0]
    # A row holds the weights of (noise, u_0, ..., u_{n-1}) in a state.
    rows = torch.cat([a0, torch.zeros(n, dtype=c.dtype)]).unsqueeze(0)
    increments = torch.cat([torch.zeros(n, 1, dtype=d.dtype), d], dim=1)
    for k in range(n):
        rows = torch.cat([rows, (c[k, : k + 1] @ rows + increments[k]).unsqueeze(0)])
    return rows[:, 0], rows[:, 1:]


def _triangle(n: int) -> tuple[Tensor, Tensor]:
    """Row and column indices of a lower triangle with its diagonal, by rows."""
    rows, columns = torch.tril_indices(n, n)
    return rows, columns


def _nfe(parameters: Tensor) -> int:
    count = parameters.shape[0]
    n = math.isqrt(count + 2) - 1
    if n < 1 or n * (n + 2) - 1 != count:
        raise ValueError(
            f"{count} numbers are not a parameter vector of {OverparametrisedBNS.label}: n evaluations have "
            f"n^2 + 2n - 1 parameters"
        )
    return n


FAMILY = OverparametrisedBNS
