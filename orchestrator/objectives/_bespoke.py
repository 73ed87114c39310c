"""Base class of BST's two losses on local errors."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.objectives.base import FamilyObjective
from solvers.families import LearnableFamily
from solvers.families._bespoke import BespokeRungeKutta


@dataclass(frozen=True)
class LocalErrorObjective(FamilyObjective):
    """A loss on single steps that start on the ground-truth trajectory; only for families with scale-time steps."""

    needs_trajectory = True

    def check(self, family: LearnableFamily) -> None:
        if not isinstance(family, BespokeRungeKutta):
            raise ValueError(
                f"objective {self.label!r} scores single scale-time steps, and {family.label} has none; use it with "
                f"bespoke_rk1 or bespoke_rk2, or choose 'psnr', 'rmse' or 'trajectory'"
            )
