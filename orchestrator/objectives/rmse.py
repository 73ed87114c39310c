"""The root-mean-square error of the samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.objectives.base import SolverObjective
from orchestrator.pairs import PairSet
from solvers.field import VelocityField
from solvers.losses import rmse_loss
from solvers.ns import NSSolver


@dataclass(frozen=True)
class RMSEObjective(SolverObjective):
    """||x_n - x(1)||, the global truncation error."""

    source = "Shaul et al. 2023 (BST), eq. 6 and Algorithm 5"
    label = "RMSE"

    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        return rmse_loss(pairs.counted(solver.sample(field, pairs.x0)), pairs.counted(pairs.x1))


OBJECTIVE = RMSEObjective
