"""Any linear solver as a non-stationary solver (Theorem 3.2 of the BNS paper), by running it on coefficients.

A solver whose updates are linear in past states and velocities is run on vectors over the basis
(x0, u_0, ..., u_{n-1}) instead of on samples: the start is e_{x0}, the k-th velocity query records its time and state
and answers e_{u_k}. The recorded states and the final one *are* (T, a, b). All of it is differentiable in whatever
the solver's grid or coefficients depend on.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler, as_time


class LinearSolver(Protocol):
    """A solver with a known number of evaluations whose updates are linear in x0 and past velocities."""

    @property
    def nfe(self) -> int: ...

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor: ...


class _Recorder:
    """A velocity field over coefficient vectors that writes down every query."""

    def __init__(self, scheduler: Scheduler, nfe: int):
        self.scheduler = scheduler
        self.basis = torch.eye(nfe + 1, dtype=torch.float64)
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scheduler.check_velocity_time(t)
        self.times.append(as_time(t))
        self.states.append(x)
        if len(self.times) >= self.basis.shape[0]:
            raise ValueError(
                f"the solver declares {self.basis.shape[0] - 1} evaluations but asks for more; correct its nfe"
            )
        return self.basis[len(self.times)]


def to_ns(solver: LinearSolver, scheduler: Scheduler) -> NSSolver:
    """The non-stationary form of ``solver`` on fields of ``scheduler``.

    Args:
        solver: Anything with ``nfe`` and ``sample``; thresholding and clipping are not linear and have no NS form.
        scheduler: The scheduler of the velocity that theta is to act on.

    Returns:
        theta with ``to_ns(solver, s).sample(u, x0) == solver.sample(u, x0)`` to rounding, for every field u of s.

    Raises:
        ValueError: The solver makes another number of evaluations than it declares, asks outside the domain, or
            yields numbers that are not finite.
    """
    recorder = _Recorder(scheduler, solver.nfe)
    final = solver.sample(recorder, recorder.basis[0])
    if len(recorder.times) != solver.nfe:
        raise ValueError(f"the solver declares {solver.nfe} evaluations but made {len(recorder.times)}")
    rows = torch.stack([*recorder.states, final])
    times = torch.stack(recorder.times)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(times).all()):
        raise ValueError(f"the solver has no finite non-stationary form on the {scheduler.name} scheduler")
    return NSSolver(times=times, a=rows[:, 0], b=rows[:, 1:])
