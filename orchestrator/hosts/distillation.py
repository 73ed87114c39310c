"""One distillation run: what is learned, by which method, and how it goes on by asking whoever has the model.

The questions are methods of :class:`orchestrator.hosts.host.Host`, asked about fixed blocks of pairs whose sums are
added in order: a host asks itself, a data-parallel trial asks the pool, and theta does not depend on who answered.
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
"""Methods by their name in configurations."""

MAX_PSNR_DB = 300.0
"""Beyond float64's rounding: what an exact sample counts as in a choice."""

BLOCK = 64
"""Pairs whose losses are summed together. Fixed, so that sums do not depend on how many hosts share them."""


@dataclass(frozen=True, kw_only=True)
class LearnedRun:
    """Which learnable family a distillation moves, on which pairs, and how.

    Attributes:
        family: Family plugin.
        options: Its options.
        sigma0: Preconditioning.
        train: Digest of the training pairs.
        settings: Adam's or Levenberg-Marquardt's settings.
        objective: Objective plugin; Levenberg-Marquardt knows the PSNR loss alone.
        objective_options: Its options.
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
        """theta of the family's parameters, on fields of ``scheduler``."""
        return self.build().to_ns(torch.tensor(parameters, dtype=torch.float64), scheduler, self.sigma0)

    def build_objective(self) -> Objective:
        return plugins.build("objectives", self.objective, self.objective_options)

    def begin(self, parameters: Tensor) -> State:
        """The state before the first iteration, from the family's parameters at the start."""
        if isinstance(self.settings, LMSettings):
            return LMState.begin(parameters, self.settings)
        return AdamState.begin(parameters)

    def resume(self, saved: dict[str, Any]) -> State:
        """A state that was stored as a dictionary."""
        return LMState(**saved) if isinstance(self.settings, LMSettings) else AdamState(**saved)

    def batch_key(self, nfe: int, guidance_scale: float) -> str | None:
        """Equal for runs whose steps can share model batches; None where a run can share none.

        Adam on the PSNR loss: Levenberg-Marquardt fills a batch with the columns of its Jacobian already.
        """
        if not isinstance(self.settings, AdamSettings) or self.objective != BATCHED_OBJECTIVE:
            return None
        pairs = min(self.settings.batch_size, self.settings.training_pairs)
        return f"nfe {nfe}, guidance {guidance_scale:g}, {pairs} pairs"

    def passes(self, state: State, nfe: int, forwards_per_evaluation: int) -> tuple[int, int]:
        """Network forwards and backwards spent on training pairs so far."""
        if isinstance(state, LMState):
            return state.evaluations * forwards_per_evaluation, 0
        settings = self.settings
        spent = state.iteration * min(settings.batch_size, settings.training_pairs) * nfe * forwards_per_evaluation
        return spent, spent


def advance(
    run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask, validation: str | None = None
) -> State:
    """``steps`` more iterations of ``run`` from ``state``, or fewer where it ends.

    Args:
        run: What is distilled.
        state: Where it stands; of the method that ``run`` has settings of.
        steps: Iterations.
        scheduler: Of the model's field.
        ask: Who has the model and the pairs: the methods of a host.
        validation: Digest of the pairs on which the last iterate is validated; None: it is not.
    """
    state = _advance(run, state, steps, scheduler, ask)
    return state if validation is None else validate(run, state, validation, scheduler, ask)


def validate(run: LearnedRun, state: State, pairs: str, scheduler: Scheduler, ask: Ask) -> State:
    """``state`` with the PSNR of its iterate on these pairs (:func:`mean_psnr`)."""
    return state.with_validation(mean_psnr(run.solver(state.parameters, scheduler), pairs, ask))


def mean_psnr(solver: NSSolver, pairs: str, ask: Ask) -> float:
    """Mean PSNR of a solver on a whole pair store, dB; not finite where the solver, or one of its samples, is not."""
    theta = to_numpy(solver.flat())
    if not np.isfinite(theta).all():
        return float("nan")
    (scores,) = ask("score", [{"theta": theta, "pairs": pairs, "metrics": ["psnr"], "indices": None}])
    # An exact sample has infinite PSNR, and one of them must not make the mean meaningless.
    return float(np.mean(np.minimum(scores["psnr"], MAX_PSNR_DB)))


def _advance(run: LearnedRun, state: State, steps: int, scheduler: Scheduler, ask: Ask) -> State:
    if isinstance(run.settings, LMSettings):
        assert isinstance(state, LMState)
        return _advance_lm(run, run.settings, state, steps, scheduler, ask)
    assert isinstance(state, AdamState)

    def of_theta(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        common = {"theta": to_numpy(solver.flat()), "pairs": run.train, "objective": run.objective}
        common["objective_options"] = run.objective_options
        return mean_of_blocks(ask("loss_and_gradient", _calls(common, indices)), indices)

    def of_parameters(parameters: Tensor, indices: list[int]) -> LossAndGradient:
        common = {"run": run, "parameters": to_numpy(parameters)}
        return mean_of_blocks(ask("loss_and_gradient_of_parameters", _calls(common, indices)), indices)

    by_steps = issubclass(plugins.load("objectives", run.objective), FamilyObjective)
    objective = ParameterObjective(of_parameters) if by_steps else of_theta
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
    """``indices`` in blocks of :data:`BLOCK`, the unit of every sum."""
    return [list(indices[first : first + BLOCK]) for first in range(0, len(indices), BLOCK)]


def mean_of_blocks(parts: Sequence[tuple[float, npt.NDArray[np.float64]]], indices: Sequence[int]) -> LossAndGradient:
    """The mean loss and gradient from per-block sums, added in order of block."""
    gradient = torch.zeros(len(parts[0][1]), dtype=torch.float64)
    loss = 0.0
    for block_loss, block_gradient in parts:
        loss += block_loss
        gradient += torch.from_numpy(block_gradient)
    return LossAndGradient(loss / len(indices), gradient / len(indices))


def to_numpy(theta: Tensor) -> npt.NDArray[np.float64]:
    """A flat theta as it crosses the wire."""
    return theta.detach().to(torch.float64).numpy()
