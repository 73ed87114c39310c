"""BNS Algorithm 2: Adam on theta with a decaying learning rate, keeping the best validated iterate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from solvers.distil.methods.base import Asking, Method, Problem, RunLength
from solvers.distil.state import DistillationState

Decay = Literal["polynomial", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class AdamState(DistillationState):
    """The state of a run, with Adam's running moments ``exp_avg`` and ``exp_avg_sq``."""

    exp_avg: list[float]
    exp_avg_sq: list[float]


@dataclass(frozen=True, kw_only=True)
class Adam(Method):
    """Adam on theta with a decaying learning rate, as in the papers.

    Attributes:
        learning_rate: Initial rate; the papers use 5e-4 (class-conditional) and 1e-4 (text).
        iterations: Number of iterations of the run and of the decay.
        batch_size: Pairs per iteration.
        decay: 'polynomial' (linear to zero, BNS D.1), 'cosine' or 'constant'.
    """

    name = "adam"
    state_type = AdamState
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
    def short(self) -> str:
        return f"lr{self.learning_rate:g}"

    def memory(self, count: int) -> dict[str, Any]:
        return {"exp_avg": [0.0] * count, "exp_avg_sq": [0.0] * count}

    def step(self, state: AdamState, problem: Problem) -> Asking[tuple[AdamState, float]]:
        parameters = torch.tensor(state.parameters, dtype=torch.float64)
        loss, gradient = yield from problem.gradient(parameters, self.batch(state.iteration))
        if not math.isfinite(loss):
            return replace(state, status="diverged"), math.nan
        parameters.grad = gradient
        optimizer = torch.optim.Adam([parameters], lr=self.rate(state.iteration))
        moments = {
            "step": torch.tensor(float(state.iteration)),
            "exp_avg": torch.tensor(state.exp_avg, dtype=torch.float64),
            "exp_avg_sq": torch.tensor(state.exp_avg_sq, dtype=torch.float64),
        }
        optimizer.state[parameters] = moments
        optimizer.step()
        after = replace(
            state,
            parameters=problem.project(parameters).tolist(),
            iteration=state.iteration + 1,
            exp_avg=moments["exp_avg"].tolist(),
            exp_avg_sq=moments["exp_avg_sq"].tolist(),
        )
        return after, loss

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


METHOD = Adam
