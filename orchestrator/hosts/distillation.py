"""One distillation run as a generator of requests: its caller answers them with a host or the pool.

Requests are sent for fixed blocks of pairs, whose sums are added in order. A host answers its own requests; a
data-parallel trial sends them to the pool. theta is the same either way.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import LearnedRun, State
from orchestrator.metrics.base import EXACT_DB
from orchestrator.objectives.base import FamilyObjective
from orchestrator.pool.requests import Ask, Request
from solvers.distil.drive import drive, map_queries
from solvers.distil.methods.base import GradientQuery, LossAndGradient, LossQuery, NormalQuery, Problem, Query
from solvers.distil.normal_equations import NormalEquations, total
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

BLOCK = 64
"""Pairs whose losses are summed in one request. Fixed, so that sums do not depend on the number of hosts."""


Steps = Generator[Sequence[Request[Any]], list[Any], State]
"""A computation that yields requests to a host, receives their values, and returns a state."""


def advance(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask, validation: str | None = None
) -> State:
    """Run :func:`advance_steps` with a callback that answers its requests."""
    return drive(advance_steps(run, state, steps, scheduler, validation), ask)


def advance_steps(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, validation: str | None = None
) -> Steps:
    """Advance ``run`` by ``steps`` iterations, or fewer if it ends earlier.

    Args:
        run: The run.
        state: State to continue from, of the run's method.
        steps: Number of iterations.
        scheduler: Scheduler of the model's field.
        validation: Name of the pairs on which the last iterate is validated; None: no validation.
    """
    in_parameters = issubclass(plugins.load("objectives", run.objective), FamilyObjective)
    problem = Problem(run.build(), scheduler, run.sigma0, in_parameters)
    iterations = run.method.iterate(state, steps, problem)
    state = yield from map_queries(iterations, partial(_requests, run), _value)
    if validation is None:
        return state
    return (yield from _validating(run, state, validation, scheduler))


def validate(run: LearnedRun, state: State, pairs: str, scheduler: Scheduler, ask: Ask) -> State:
    """``state`` with its iterate's PSNR on these pairs (:func:`mean_psnr`)."""
    return drive(_validating(run, state, pairs, scheduler), ask)


def _validating(run: LearnedRun, state: State, pairs: str, scheduler: Scheduler) -> Steps:
    psnr = yield from _mean_psnr(run.solver(state.parameters, scheduler), pairs)
    return state.with_validation(psnr)


def mean_psnr(solver: NSSolver, pairs: str, ask: Ask) -> float:
    """Mean PSNR of a solver on a whole pair set, dB; not finite if theta or one of its samples is not finite."""
    return drive(_mean_psnr(solver, pairs), ask)


def _mean_psnr(solver: NSSolver, pairs: str) -> Generator[Sequence[Request[Any]], list[Any], float]:
    theta = to_numpy(solver.flat())
    if not np.isfinite(theta).all():
        return float("nan")
    (scores,) = yield [Request.of(HostProtocol.score, theta=theta, pairs=pairs, metrics=["psnr"])]
    # An exact sample has infinite PSNR; a single one would make the mean meaningless.
    return float(np.mean(np.minimum(scores["psnr"], EXACT_DB)))


def _requests(run: LearnedRun, query: Query) -> list[Request[Any]]:
    """The requests, one per block of pairs, whose sums answer a query."""
    at = query.at if isinstance(query, GradientQuery) else query.solver
    values = to_numpy(at.flat() if isinstance(at, NSSolver) else at)
    return [_request(run, query, values, block) for block in blocks(query.indices)]


def _request(run: LearnedRun, query: Query, values: npt.NDArray[np.float64], block: list[int]) -> Request[Any]:
    """The request for one block; ``values`` are flat theta, or the parameters at which the query is made."""
    if isinstance(query, NormalQuery):
        return Request.of(
            HostProtocol.normal_equations,
            theta=values,
            pairs=run.train,
            indices=block,
            jacobian=query.jacobian,
            free=query.free.numpy(),
        )
    if isinstance(query, LossQuery):
        return Request.of(HostProtocol.loss, theta=values, pairs=run.train, indices=block)
    if not isinstance(query.at, NSSolver):
        return Request.of(HostProtocol.loss_and_gradient_of_parameters, run=run, parameters=values, indices=block)
    return Request.of(
        HostProtocol.loss_and_gradient,
        theta=values,
        pairs=run.train,
        indices=block,
        objective=run.objective,
        objective_options=run.objective_options,
    )


def _value(query: Query, sums: list[Any]) -> LossAndGradient | NormalEquations | float:
    """The answer to a query, from the sums over its blocks."""
    if isinstance(query, NormalQuery):
        return total(sums)
    if isinstance(query, LossQuery):
        loss: float = sum(sums) / len(query.indices)
        return loss
    return mean_of_blocks(sums, query.indices)


def blocks(indices: Sequence[int]) -> list[list[int]]:
    """Split ``indices`` into blocks of :data:`BLOCK`, the unit of every sum."""
    return [list(indices[first : first + BLOCK]) for first in range(0, len(indices), BLOCK)]


def mean_of_blocks(parts: Sequence[tuple[float, npt.NDArray[np.float64]]], indices: Sequence[int]) -> LossAndGradient:
    """The mean loss and gradient from per-block sums, added in the order of the blocks."""
    gradient = torch.zeros(len(parts[0][1]), dtype=torch.float64)
    loss = 0.0
    for block_loss, block_gradient in parts:
        loss += block_loss
        gradient += torch.from_numpy(block_gradient)
    return LossAndGradient(loss / len(indices), gradient / len(indices))


def to_numpy(theta: Tensor) -> npt.NDArray[np.float64]:
    """A flat theta as a float64 array, the form in which it is sent."""
    return theta.detach().to(torch.float64).numpy()
