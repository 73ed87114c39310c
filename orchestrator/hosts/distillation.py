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
from orchestrator.hosts.runs import LearnedRun, PairSets, State, scales_of, sets_of
from orchestrator.metrics.base import EXACT_DB
from orchestrator.objectives.base import FamilyObjective
from orchestrator.pool.requests import Ask, Request
from solvers.distil.drive import drive, map_queries
from solvers.distil.methods.base import (
    GradientQuery,
    LossAndGradient,
    LossQuery,
    NormalQuery,
    Problem,
    Query,
    Several,
    SingleQuery,
)
from solvers.distil.normal_equations import total
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

BLOCK = 64
"""Pairs whose losses are summed in one request. Fixed, so that sums do not depend on the number of hosts."""


Steps = Generator[Sequence[Request[Any]], list[Any], State]
"""A computation that yields requests to a host, receives their values, and returns a state."""


def advance(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask, validation: PairSets | None = None
) -> State:
    """Run :func:`advance_steps` with a callback that answers its requests."""
    return drive(advance_steps(run, state, steps, scheduler, validation), ask)


def advance_steps(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, validation: PairSets | None = None
) -> Steps:
    """Advance ``run`` by ``steps`` iterations, or fewer if it ends earlier.

    Args:
        run: The run.
        state: State to continue from, of the run's method.
        steps: Number of iterations.
        scheduler: Scheduler of the model's field.
        validation: Name of the pairs on which the last iterate is validated, or several sets, one per guidance scale;
            None: no validation.
    """
    in_parameters = issubclass(plugins.load("objectives", run.objective), FamilyObjective)
    problem = Problem(run.build(), scheduler, run.sigma0, in_parameters, scales_of(run.train))
    iterations = run.method.iterate(state, steps, problem)
    state = yield from map_queries(iterations, partial(_requests, run), _value)
    if validation is None:
        return state
    return (yield from _validating(run, state, validation, scheduler))


def validate(run: LearnedRun, state: State, pairs: PairSets, scheduler: Scheduler, ask: Ask) -> State:
    """``state`` with its iterate's PSNR on these pairs (:func:`mean_psnr`); of several sets, the mean over them."""
    return drive(_validating(run, state, pairs, scheduler), ask)


def _validating(run: LearnedRun, state: State, pairs: PairSets, scheduler: Scheduler) -> Steps:
    patience = run.method.validations_without_gain
    if isinstance(pairs, str):
        (psnr,) = yield from _mean_psnrs([run.solver(state.parameters, scheduler)], [pairs])
        return state.with_validation(psnr, patience=patience)
    solvers = [run.solver(state.parameters, scheduler, scale) for scale in scales_of(pairs)]
    each = yield from _mean_psnrs(solvers, sets_of(pairs))
    return state.with_validation(sum(each) / len(each), each, patience)


def mean_psnr(solver: NSSolver, pairs: str, ask: Ask) -> float:
    """Mean PSNR of a solver on a whole pair set, dB; not finite if theta or one of its samples is not finite."""
    (psnr,) = drive(_mean_psnrs([solver], [pairs]), ask)
    return psnr


def _mean_psnrs(
    solvers: Sequence[NSSolver], pairs: Sequence[str]
) -> Generator[Sequence[Request[Any]], list[Any], list[float]]:
    """Mean PSNR of each solver on its own pairs; all are NaN if a theta is not finite."""
    thetas = [to_numpy(solver.flat()) for solver in solvers]
    if not all(np.isfinite(theta).all() for theta in thetas):
        return [float("nan")] * len(thetas)
    scores = yield [
        Request.of(HostProtocol.score, theta=theta, pairs=name, metrics=["psnr"])
        for theta, name in zip(thetas, pairs, strict=True)
    ]
    # An exact sample has infinite PSNR; a single one would make the mean meaningless.
    return [float(np.mean(np.minimum(each["psnr"], EXACT_DB))) for each in scores]


def _requests(run: LearnedRun, query: Query) -> list[Request[Any]]:
    """The requests, one per block of pairs, whose sums answer a query."""
    if isinstance(query, Several):
        return [request for single in query.queries for request in _requests(run, single)]
    at = query.at if isinstance(query, GradientQuery) else query.solver
    values = to_numpy(at.flat() if isinstance(at, NSSolver) else at)
    return [_request(run, query, values, block) for block in blocks(query.indices)]


def _request(run: LearnedRun, query: SingleQuery, values: npt.NDArray[np.float64], block: list[int]) -> Request[Any]:
    """The request for one block; ``values`` are flat theta, or the parameters at which the query is made."""
    pairs = sets_of(run.train)[0 if isinstance(query, GradientQuery) else query.pair_set]
    if isinstance(query, NormalQuery):
        return Request.of(
            HostProtocol.normal_equations,
            theta=values,
            pairs=pairs,
            indices=block,
            jacobian=query.jacobian,
            free=query.free.numpy(),
        )
    if isinstance(query, LossQuery):
        return Request.of(HostProtocol.loss, theta=values, pairs=pairs, indices=block)
    if not isinstance(query.at, NSSolver):
        return Request.of(HostProtocol.loss_and_gradient_of_parameters, run=run, parameters=values, indices=block)
    return Request.of(
        HostProtocol.loss_and_gradient,
        theta=values,
        pairs=pairs,
        indices=block,
        objective=run.objective,
        objective_options=run.objective_options,
    )


def _value(query: Query, sums: list[Any]) -> Any:
    """The answer to a query, from the sums over its blocks."""
    if isinstance(query, Several):
        rest = iter(sums)
        return [_value(single, [next(rest) for _ in blocks(single.indices)]) for single in query.queries]
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
