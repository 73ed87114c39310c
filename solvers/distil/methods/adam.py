"""BNS Algorithm 2: Adam on theta with a decaying learning rate, keeping the best validated iterate.

The method is split into a state that can be stored and sent (:class:`AdamState`) and a function that advances it by k
iterations (:func:`advance`), so that a trial can hold the state while a host with the model and the pairs takes the
steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.distil.drive import drive
from solvers.distil.methods.base import GradientQuery, LossAndGradient, Method, Query, RunLength
from solvers.distil.state import DIVERGENCE_DB as DIVERGENCE_DB
from solvers.distil.state import DistillationState
from solvers.distil.state import Status as Status
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

Decay = Literal["polynomial", "cosine", "constant"]


Objective = Callable[[NSSolver, list[int]], LossAndGradient]
"""``objective(solver, indices)``: mean loss (e.g. eq. 13) on these training pairs, and its gradient in theta."""


@dataclass(frozen=True)
class ParameterObjective:
    """A loss that is not a function of theta alone, such as BST's local errors.

    Attributes:
        of: ``of(parameters, indices)`` returns the mean loss and its gradient in the family's own parameters.
    """

    of: Callable[[Tensor, list[int]], LossAndGradient]


@dataclass(frozen=True, kw_only=True)
class Adam(Method):
    """Adam on theta with a decaying learning rate, as in the papers.

    Attributes:
        learning_rate: Initial rate; the papers use 5e-4 (class-conditional) and 1e-4 (text).
        iterations: Number of iterations of the run and of the decay.
        batch_size: Pairs per iteration.
        decay: 'polynomial' (linear to zero, BNS D.1), 'cosine' or 'constant'.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from.
    """

    name = "adam"
    default_length = RunLength(iterations=1500, batch_size=40, validate_every=100)
    logged = ("learning_rate", "decay")
    has_backward = True
    shares_batches = True

    learning_rate: float = 5e-4
    iterations: int = 15_000
    batch_size: int = 40
    decay: Decay = "polynomial"

    @classmethod
    def variants(cls, options: Mapping[str, Any], half_precision: bool) -> list[dict[str, Any]]:
        return [{**options, "learning_rate": rate} for rate in options["learning_rate"]]

    @property
    def needs_gradients(self) -> bool:
        return True

    @property
    def short(self) -> str:
        return f"lr{self.learning_rate:g}"

    def begin(self, parameters: Tensor) -> AdamState:
        return AdamState.begin(parameters)

    def resume(self, saved: Mapping[str, Any]) -> AdamState:
        return AdamState(**saved)

    def iterate(
        self,
        state: DistillationState,
        steps: int,
        family: LearnableFamily,
        scheduler: Scheduler,
        sigma0: float,
        *,
        in_parameters: bool = False,
    ) -> Generator[Query, Any, DistillationState]:
        assert isinstance(state, AdamState)
        return iterations(state, steps, self, family, scheduler, sigma0, in_parameters=in_parameters)

    def evaluations(self, state: DistillationState, nfe: int) -> tuple[int, int]:
        spent = state.iteration * min(self.batch_size, self.training_pairs) * nfe
        return spent, spent

    def rate(self, iteration: int) -> float:
        """The learning rate at ``iteration``."""
        progress = iteration / self.iterations
        match self.decay:
            case "polynomial":
                return self.learning_rate * (1 - progress)
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            case "constant":
                return self.learning_rate


@dataclass(frozen=True)
class AdamState(DistillationState):
    """Everything needed to continue a distillation run, as plain lists that can be written as JSON.

    Attributes:
        parameters: Parameters of the learnable family.
        exp_avg, exp_avg_sq: Adam's running moments.
        iteration: Number of completed iterations.
        status: 'running', 'finished', 'diverged', or 'stopped' (early, by a search).
        loss: Mean loss over the iterations since the last validation.
        validated: One entry per validation: iteration, psnr_db, parameters. The first is the start itself. All are
            kept, so that a different stopping criterion can be applied later.
    """

    parameters: list[float]
    exp_avg: list[float]
    exp_avg_sq: list[float]
    iteration: int = 0
    status: Status = "running"
    loss: float | None = None
    validated: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, parameters: Tensor) -> AdamState:
        """The state before the first iteration."""
        zeros = [0.0] * len(parameters)
        return cls(parameters=parameters.tolist(), exp_avg=zeros, exp_avg_sq=zeros)


def advance(
    state: AdamState,
    steps: int,
    settings: Adam,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
    objective: Objective | ParameterObjective,
) -> AdamState:
    """Run :func:`iterations` on an objective at hand; arguments and result are the same."""
    in_parameters = isinstance(objective, ParameterObjective)
    evaluate: Callable[[Any, list[int]], LossAndGradient] = (
        objective.of if isinstance(objective, ParameterObjective) else objective
    )
    generator = iterations(state, steps, settings, family, scheduler, sigma0, in_parameters=in_parameters)

    def answer(query: Query) -> LossAndGradient:
        assert isinstance(query, GradientQuery)
        return evaluate(query.at, query.indices)

    return drive(generator, answer)


def iterations(
    state: AdamState,
    steps: int,
    settings: Adam,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
    *,
    in_parameters: bool = False,
) -> Generator[Query, Any, AdamState]:
    """Run ``steps`` more iterations of Algorithm 2, or fewer if the run ends or diverges.

    Yields the evaluations it needs and returns the new state. ``in_parameters`` asks for losses at the family's
    parameters instead of the solver (:class:`ParameterObjective`).

    The result depends on the state alone: two calls with k steps equal one call with 2k, bit for bit. A loss or
    gradient that is not finite ends the run as 'diverged', with the last finite parameters.
    """
    if state.status != "running":
        return state
    parameters = torch.tensor(state.parameters, dtype=torch.float64, requires_grad=True)
    optimizer = _optimizer(parameters, state, settings)
    last = min(state.iteration + steps, settings.iterations)
    losses: list[float] = []
    iteration = state.iteration
    status: Status = state.status
    while iteration < last:
        indices = batch_indices(settings.training_pairs, settings.batch_size, settings.seed, iteration)
        if in_parameters:
            loss, gradient = yield GradientQuery(parameters.detach(), indices)
        else:
            solver = family.to_ns(parameters, scheduler, sigma0)
            loss, theta_gradient = yield GradientQuery(solver.detach(), indices)
            (gradient,) = torch.autograd.grad(solver.flat(), parameters, theta_gradient)
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            status = "diverged"
            break
        parameters.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(iteration)
        optimizer.step()
        with torch.no_grad():
            parameters.copy_(family.project(parameters.detach(), scheduler, sigma0))
        losses.append(loss)
        iteration += 1
    if status == "running" and iteration >= settings.iterations:
        status = "finished"
    moments = optimizer.state.get(parameters, {})
    return dataclasses.replace(
        state,
        parameters=parameters.detach().tolist(),
        exp_avg=moments["exp_avg"].tolist() if moments else state.exp_avg,
        exp_avg_sq=moments["exp_avg_sq"].tolist() if moments else state.exp_avg_sq,
        iteration=iteration,
        status=status,
        loss=sum(losses) / len(losses) if losses else state.loss,
    )


def _optimizer(parameters: Tensor, state: AdamState, settings: Adam) -> torch.optim.Adam:
    """Adam over ``parameters``, with the moments of ``state``."""
    optimizer = torch.optim.Adam([parameters], lr=settings.learning_rate)
    if state.iteration:
        optimizer.state[parameters] = {
            "step": torch.tensor(float(state.iteration)),
            "exp_avg": torch.tensor(state.exp_avg, dtype=torch.float64),
            "exp_avg_sq": torch.tensor(state.exp_avg_sq, dtype=torch.float64),
        }
    return optimizer


METHOD = Adam
