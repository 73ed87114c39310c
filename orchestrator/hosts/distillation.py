"""Drives one distillation run. Every model evaluation goes through ``ask``, a callback to a host or the pool.

Requests are methods of :class:`orchestrator.hosts.host.Host`, called on fixed blocks of pairs whose sums are added in
order. A host calls its own methods; a data-parallel trial sends them to the pool. theta is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.hosts.batching import BATCHED_OBJECTIVE
from orchestrator.hosts.lockstep import Ask
from orchestrator.objectives.base import FamilyObjective, Objective
from solvers.distil import adam, levenberg_marquardt
from solvers.distil.adam import AdamSettings, AdamState, LossAndGradient, ParameterObjective
from solvers.distil.levenberg_marquardt import LMSettings, LMState
from solvers.distil.normal_equations import Jacobian, NormalEquations, total
from solvers.families import LearnableFamily
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

Settings = AdamSettings | LMSettings
State = AdamState | LMState

SETTINGS: dict[str, type[Settings]] = {"adam": AdamSettings, "levenberg_marquardt": LMSettings}
"""Settings class of each method, by the method's name in configurations."""

MAX_PSNR_DB = 300.0
"""PSNR assigned to an exact sample when solvers are compared; beyond the reach of float64 rounding."""

BLOCK = 64
"""Pairs whose losses are summed in one request. Fixed, so that sums do not depend on the number of hosts."""


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
    (scores,) = ask("score", [{"theta": theta, "pairs": pairs, "metrics": ["psnr"], "indices": None}])
    # An exact sample has infinite PSNR; a single one would make the mean meaningless.
    return float(np.mean(np.minimum(scores["psnr"], MAX_PSNR_DB)))


def _advance(run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask) -> State:
    if isinstance(run.settings, LMSettings):
        assert isinstance(state, LMState)
        return _advance_lm(run, run.settings, state, steps, scheduler, ask)
    assert isinstance(state, AdamState)

    def theta_objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        common = {"theta": to_numpy(solver.flat()), "pairs": run.train, "objective": run.objective}
        common["objective_options"] = run.objective_options
        return mean_of_blocks(ask("loss_and_gradient", _calls(common, indices)), indices)

    def parameter_objective(parameters: Tensor, indices: list[int]) -> LossAndGradient:
        common = {"run": run, "parameters": to_numpy(parameters)}
        return mean_of_blocks(ask("loss_and_gradient_of_parameters", _calls(common, indices)), indices)

    in_parameters = issubclass(plugins.load("objectives", run.objective), FamilyObjective)
    objective = ParameterObjective(parameter_objective) if in_parameters else theta_objective
    return adam.advance(state, steps, run.settings, run.build(), scheduler, run.sigma0, objective)


def _advance_lm(
    run: LearnedRun, settings: LMSettings, state: LMState, steps: int, scheduler: Scheduler, ask: Ask
) -> LMState:
    def normal(solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
        common = {"theta": to_numpy(solver.flat()), "pairs": run.train, "jacobian": jacobian, "free": free.numpy()}
        return total(ask("normal_equations", _calls(common, indices)))

    def loss(solver: NSSolver, indices: list[int]) -> float:
        sums = ask("loss", _calls({"theta": to_numpy(solver.flat()), "pairs": run.train}, indices))
        return sum(sums) / len(indices)

    return levenberg_marquardt.advance(state, steps, settings, run.build(), scheduler, run.sigma0, normal, loss)


def _calls(common: dict[str, Any], indices: Sequence[int]) -> list[dict[str, Any]]:
    return [common | {"indices": block} for block in blocks(indices)]


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
