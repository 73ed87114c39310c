"""A distillation run as it is sent to a host: what is learned, on which pairs, by which method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class AtScale(NamedTuple):
    """A pair set of several, one per guidance scale.

    Attributes:
        guidance_scale: Guidance scale of the pairs.
        pairs: Name of the pairs (``PairSpec.name``).
    """

    guidance_scale: float
    pairs: str


PairSets = str | tuple[AtScale, ...]
"""The name of one pair set, or several sets, one per guidance scale."""


def sets_of(pairs: PairSets) -> tuple[str, ...]:
    """The names of the pair sets."""
    return (pairs,) if isinstance(pairs, str) else tuple(each.pairs for each in pairs)


def scales_of(pairs: PairSets) -> tuple[float, ...]:
    """The guidance scales of several pair sets; empty for a single one, whose scale its spec has."""
    return () if isinstance(pairs, str) else tuple(each.guidance_scale for each in pairs)


@dataclass(frozen=True, kw_only=True)
class LearnedRun:
    """A distillation run: a learnable family, its training pairs, and a method.

    Attributes:
        family: Family plugin.
        options: Options of the family.
        sigma0: Preconditioning.
        train: Name of the training pairs (``PairSpec.name``), or several sets of them, one per guidance scale.
        method: Method, with its settings.
        objective: Objective plugin; some methods minimise only the PSNR loss.
        objective_options: Options of the objective.

    Raises:
        ValueError: ``train`` is several sets, but the method or the objective learns from one.
    """

    family: str
    options: dict[str, Any]
    sigma0: float
    train: PairSets
    method: Method
    objective: str = "psnr"
    objective_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.train, str) or (self.method.several_sets and self.objective == BATCHED_OBJECTIVE):
            return
        raise ValueError(
            f"method {self.method.name!r} with objective {self.objective!r} learns from one set of training pairs, not "
            f"from {len(self.train)}; use method 'levenberg_marquardt' and objective 'psnr' for several guidance scales"
        )

    def build(self) -> LearnableFamily:
        return plugins.build("families", self.family, self.options)

    def solver(
        self, parameters: Sequence[float], scheduler: Scheduler, guidance_scale: float | None = None
    ) -> NSSolver:
        """The solver with these parameters of the family, for fields of ``scheduler``.

        Args:
            parameters: Parameters of the family.
            scheduler: Scheduler of the model's field.
            guidance_scale: Scale at which it is used, for a family whose solvers depend on it.
        """
        family = self.build() if guidance_scale is None else self.build().at(guidance_scale)
        return family.to_ns(torch.tensor(parameters, dtype=torch.float64), scheduler, self.sigma0)

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
