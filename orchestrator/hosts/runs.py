"""A distillation run as it is sent to a host: what is learned, on which pairs, by which method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from orchestrator import plugins
from orchestrator.objectives.base import Objective
from solvers.distil.methods.base import Method
from solvers.distil.state import DistillationState
from solvers.families import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

State = DistillationState

BATCHED_OBJECTIVE = "psnr"
"""The only objective whose steps can share model batches with those of other runs."""


@dataclass(frozen=True, kw_only=True)
class LearnedRun:
    """A distillation run: a learnable family, its training pairs, and a method.

    Attributes:
        family: Family plugin.
        options: Options of the family.
        sigma0: Preconditioning.
        train: Name of the training pairs (``PairSpec.name``).
        method: Method, with its settings.
        objective: Objective plugin; some methods minimise only the PSNR loss.
        objective_options: Options of the objective.
    """

    family: str
    options: dict[str, Any]
    sigma0: float
    train: str
    method: Method
    objective: str = "psnr"
    objective_options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> LearnableFamily:
        return plugins.build("families", self.family, self.options)

    def solver(self, parameters: Sequence[float], scheduler: Scheduler) -> NSSolver:
        """The solver with these parameters of the family, for fields of ``scheduler``."""
        return self.build().to_ns(torch.tensor(parameters, dtype=torch.float64), scheduler, self.sigma0)

    def build_objective(self) -> Objective:
        return plugins.build("objectives", self.objective, self.objective_options)

    def batch_key(self, nfe: int, guidance_scale: float) -> str | None:
        """A key that is equal for runs whose steps can share model batches; None if this run's steps cannot.

        Only single gradients of the PSNR loss can: Levenberg-Marquardt already fills a batch with the columns of its
        Jacobian.
        """
        if not self.method.shares_batches or self.objective != BATCHED_OBJECTIVE:
            return None
        pairs = min(self.method.batch_size, self.method.training_pairs)
        return f"nfe {nfe}, guidance {guidance_scale:g}, {pairs} pairs"

    def passes(self, state: State, nfe: int, forwards_per_evaluation: int) -> tuple[int, int]:
        """Network forwards and backwards spent on training pairs up to ``state``."""
        forward, backward = self.method.evaluations(state, nfe)
        return forward * forwards_per_evaluation, backward * forwards_per_evaluation
