"""A distillation run as it is sent to a host: what is learned, on which pairs, by which method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.objectives.base import Objective
from solvers.distil.adam import AdamSettings, AdamState
from solvers.distil.levenberg_marquardt import LMSettings, LMState
from solvers.families import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

Settings = AdamSettings | LMSettings
State = AdamState | LMState

SETTINGS: dict[str, type[Settings]] = {"adam": AdamSettings, "levenberg_marquardt": LMSettings}
"""Settings class of each method, by the method's name in configurations."""

BATCHED_OBJECTIVE = "psnr"
"""The only objective whose steps can share model batches with those of other runs."""


@dataclass(frozen=True, kw_only=True)
class LearnedRun:
    """A distillation run: a learnable family, its training pairs, and the method's settings.

    Attributes:
        family: Family plugin.
        options: Options of the family.
        sigma0: Preconditioning.
        train: Digest of the training pairs.
        settings: Settings of Adam or Levenberg-Marquardt.
        objective: Objective plugin; Levenberg-Marquardt supports only the PSNR loss.
        objective_options: Options of the objective.
    """

    family: str
    options: dict[str, Any]
    sigma0: float
    train: str
    settings: Settings
    objective: str = "psnr"
    objective_options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> LearnableFamily:
        return plugins.build("families", self.family, self.options)

    def solver(self, parameters: Sequence[float], scheduler: Scheduler) -> NSSolver:
        """The solver with these parameters of the family, for fields of ``scheduler``."""
        return self.build().to_ns(torch.tensor(parameters, dtype=torch.float64), scheduler, self.sigma0)

    def build_objective(self) -> Objective:
        return plugins.build("objectives", self.objective, self.objective_options)

    def begin(self, parameters: Tensor) -> State:
        """The state before the first iteration.

        Args:
            parameters: Initial parameters of the family.
        """
        if isinstance(self.settings, LMSettings):
            return LMState.begin(parameters, self.settings)
        return AdamState.begin(parameters)

    def resume(self, saved: dict[str, Any]) -> State:
        """The state restored from a dictionary."""
        return LMState(**saved) if isinstance(self.settings, LMSettings) else AdamState(**saved)

    def batch_key(self, nfe: int, guidance_scale: float) -> str | None:
        """A key that is equal for runs whose steps can share model batches; None if this run's steps cannot.

        Only Adam on the PSNR loss has one: Levenberg-Marquardt already fills a batch with the columns of its Jacobian.
        """
        if not isinstance(self.settings, AdamSettings) or self.objective != BATCHED_OBJECTIVE:
            return None
        pairs = min(self.settings.batch_size, self.settings.training_pairs)
        return f"nfe {nfe}, guidance {guidance_scale:g}, {pairs} pairs"

    def passes(self, state: State, nfe: int, forwards_per_evaluation: int) -> tuple[int, int]:
        """Network forwards and backwards spent on training pairs up to ``state``."""
        if isinstance(state, LMState):
            return state.evaluations * forwards_per_evaluation, 0
        settings = self.settings
        spent = state.iteration * min(settings.batch_size, settings.training_pairs) * nfe * forwards_per_evaluation
        return spent, spent
