"""BNS Algorithm 2: Adam on theta with a decaying learning rate, the best validated iterate kept.

Split into a state that can be stored and sent (:class:`AdamState`) and a function that advances it by k iterations
(:func:`advance`), so that a trial may hold the state while a host, which has the model and the pairs, does the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.families.base import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

Decay = Literal["polynomial", "cosine", "constant"]
Status = Literal["running", "finished", "diverged", "stopped"]

DIVERGENCE_DB = 20.0
"""A validation PSNR this far below the start's counts as diverged: no run seen here has come back from there."""


class LossAndGradient(NamedTuple):
    """Mean loss over a batch and its gradient in theta's flat form, float64."""

    loss: float
    gradient: Tensor


Objective = Callable[[NSSolver, list[int]], LossAndGradient]
"""``objective(theta, indices)``: the loss of eq. 13 and its gradient on those training pairs."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """What one distillation run is asked to do.

    Attributes:
        learning_rate: Initial rate; the papers use 5e-4 (class-conditional) and 1e-4 (text).
        iterations: Length of the run and of the decay.
        batch_size: Pairs per iteration.
        decay: 'polynomial' (linear to zero, BNS D.1), 'cosine' or 'constant'.
        seed: Seed of the batch order.
        training_pairs: Number of pairs to draw from.
    """

    learning_rate: float = 5e-4
    iterations: int = 15_000
    batch_size: int = 40
    decay: Decay = "polynomial"
    seed: int = 0
    training_pairs: int = 520

    def rate(self, iteration: int) -> float:
        """The learning rate of ``iteration``."""
        progress = iteration / self.iterations
        match self.decay:
            case "polynomial":
                return self.learning_rate * (1 - progress)
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            case "constant":
                return self.learning_rate


@dataclass(frozen=True)
class AdamState:
    """Everything a distillation run needs to go on: plain lists, so that it can be written as JSON.

    Attributes:
        parameters: Parameters of the learnable family.
        exp_avg, exp_avg_sq: Adam's running moments.
        iteration: Iterations done.
        status: 'running', 'finished', 'diverged', or 'stopped' (early, by a search).
        loss: Mean loss over the iterations since the last validation.
        validated: One entry per validation: iteration, psnr_db, parameters. The first is the start itself; all are
            kept, so that another stopping criterion can be applied later.
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
        zeros = [0.0] * len(parameters)
        return cls(parameters=parameters.tolist(), exp_avg=zeros, exp_avg_sq=zeros)

    @property
    def best(self) -> dict[str, Any]:
        """The validated iterate of highest PSNR: the start itself where nothing improved on it.

        Raises:
            ValueError: Nothing was validated yet.
        """
        if not self.validated:
            raise ValueError("no iterate was validated yet")
        return max(self.validated, key=lambda entry: entry["psnr_db"])

    def with_validation(self, psnr_db: float) -> AdamState:
        """The state after a validation; notices divergence."""
        entry = {"iteration": self.iteration, "psnr_db": psnr_db, "parameters": self.parameters}
        if not math.isfinite(psnr_db):
            return dataclasses.replace(self, status="diverged")
        status: Status = self.status
        if self.validated and psnr_db < self.validated[0]["psnr_db"] - DIVERGENCE_DB:
            status = "diverged"
        return dataclasses.replace(self, status=status, validated=[*self.validated, entry])


def advance(
    state: AdamState,
    steps: int,
    settings: AdamSettings,
    family: LearnableFamily,
    scheduler: Scheduler,
    sigma0: float,
    objective: Objective,
) -> AdamState:
    """``steps`` more iterations of Algorithm 2, or fewer where the run ends or diverges.

    The result depends on the state alone: two calls of k steps equal one of 2k, bit for bit. A loss or gradient that
    is not finite ends the run as 'diverged' with the last finite parameters.
    """
    if state.status != "running":
        return state
    parameters = torch.tensor(state.parameters, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=settings.learning_rate)
    if state.iteration:
        optimizer.state[parameters] = {
            "step": torch.tensor(float(state.iteration)),
            "exp_avg": torch.tensor(state.exp_avg, dtype=torch.float64),
            "exp_avg_sq": torch.tensor(state.exp_avg_sq, dtype=torch.float64),
        }
    last = min(state.iteration + steps, settings.iterations)
    losses: list[float] = []
    iteration = state.iteration
    status: Status = state.status
    while iteration < last:
        solver = family.to_ns(parameters, scheduler, sigma0)
        indices = batch_indices(settings.training_pairs, settings.batch_size, settings.seed, iteration)
        loss, gradient = objective(solver.detach(), indices)
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            status = "diverged"
            break
        optimizer.zero_grad()
        solver.flat().backward(gradient)
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
