"""The PSNR loss of Bespoke Non-Stationary solvers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.objectives.base import SolverObjective
from orchestrator.pairs import PairSet
from solvers.field import VelocityField
from solvers.losses import psnr_loss
from solvers.ns import NSSolver


@dataclass(frozen=True)
class PSNRObjective(SolverObjective):
    """log ||x_n - x(1)||^2, the log error of the samples; minimising its mean maximises the mean PSNR."""

    source = "Shaul et al. 2024 (BNS), eq. 13, with its sign corrected"
    label = "PSNR"

    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        return psnr_loss(pairs.counted(solver.sample(field, pairs.x0)), pairs.counted(pairs.x1))


OBJECTIVE = PSNRObjective
