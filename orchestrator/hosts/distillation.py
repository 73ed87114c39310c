"""Drives one distillation run. Every model evaluation goes through ``ask``, a callback to a host or the pool.

Requests are sent for fixed blocks of pairs, whose sums are added in order. A host answers its own requests; a
data-parallel trial sends them to the pool. theta is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import LearnedRun, State
from orchestrator.objectives.base import FamilyObjective
from orchestrator.pool.requests import Ask, Request
from solvers.distil import adam, levenberg_marquardt
from solvers.distil.adam import AdamState, LossAndGradient, ParameterObjective
from solvers.distil.levenberg_marquardt import LMSettings, LMState
from solvers.distil.normal_equations import Jacobian, NormalEquations, total
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

MAX_PSNR_DB = 300.0
"""PSNR assigned to an exact sample when solvers are compared; beyond the reach of float64 rounding."""

BLOCK = 64
"""Pairs whose losses are summed in one request. Fixed, so that sums do not depend on the number of hosts."""


def advance(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask, validation: str | None = None
) -> State:
    """Advance ``run`` by ``steps`` iterations, or fewer if it ends earlier.

    Args:
        run: The run.
        state: State to continue from, of the method that ``run.settings`` selects.
        steps: Number of iterations.
        scheduler: Scheduler of the model's field.
        ask: Calls methods of a host that has the model and the pairs.
        validation: Digest of the pairs on which the last iterate is validated; None: no validation.
    """
    state = _advance(run, state, steps, scheduler, ask)
    return state if validation is None else validate(run, state, validation, scheduler, ask)


def validate(run: LearnedRun, state: State, pairs: str, scheduler: Scheduler, ask: Ask) -> State:
    """``state`` with its iterate's PSNR on these pairs (:func:`mean_psnr`)."""
    return state.with_validation(mean_psnr(run.solver(state.parameters, scheduler), pairs, ask))


def mean_psnr(solver: NSSolver, pairs: str, ask: Ask) -> float:
    """Mean PSNR of a solver on a whole pair set, dB; not finite if theta or one of its samples is not finite."""
    theta = to_numpy(solver.flat())
    if not np.isfinite(theta).all():
        return float("nan")
    (scores,) = ask([Request.of(HostProtocol.score, theta=theta, pairs=pairs, metrics=["psnr"])])
    # An exact sample has infinite PSNR; a single one would make the mean meaningless.
    return float(np.mean(np.minimum(scores["psnr"], MAX_PSNR_DB)))


def _advance(run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask) -> State:
    if isinstance(run.settings, LMSettings):
        assert isinstance(state, LMState)
        return _advance_lm(run, run.settings, state, steps, scheduler, ask)
    assert isinstance(state, AdamState)

    def theta_objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        theta = to_numpy(solver.flat())
        requests = [
            Request.of(
                HostProtocol.loss_and_gradient,
                theta=theta,
                pairs=run.train,
                indices=block,
                objective=run.objective,
                objective_options=run.objective_options,
            )
            for block in blocks(indices)
        ]
        return mean_of_blocks(ask(requests), indices)

    def parameter_objective(parameters: Tensor, indices: list[int]) -> LossAndGradient:
        values = to_numpy(parameters)
        requests = [
            Request.of(HostProtocol.loss_and_gradient_of_parameters, run=run, parameters=values, indices=block)
            for block in blocks(indices)
        ]
        return mean_of_blocks(ask(requests), indices)

    in_parameters = issubclass(plugins.load("objectives", run.objective), FamilyObjective)
    objective = ParameterObjective(parameter_objective) if in_parameters else theta_objective
    return adam.advance(state, steps, run.settings, run.build(), scheduler, run.sigma0, objective)


def _advance_lm(
    run: LearnedRun, settings: LMSettings, state: LMState, steps: int, scheduler: Scheduler, ask: Ask
) -> LMState:
    def normal(solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
        theta = to_numpy(solver.flat())
        requests = [
            Request.of(
                HostProtocol.normal_equations,
                theta=theta,
                pairs=run.train,
                indices=block,
                jacobian=jacobian,
                free=free.numpy(),
            )
            for block in blocks(indices)
        ]
        return total(ask(requests))

    def loss(solver: NSSolver, indices: list[int]) -> float:
        theta = to_numpy(solver.flat())
        requests = [
            Request.of(HostProtocol.loss, theta=theta, pairs=run.train, indices=block) for block in blocks(indices)
        ]
        return sum(ask(requests)) / len(indices)

    return levenberg_marquardt.advance(state, steps, settings, run.build(), scheduler, run.sigma0, normal, loss)


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
