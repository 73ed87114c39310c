"""The RMSE-bound loss of Bespoke scale-time solvers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.objectives._bespoke import LocalErrorObjective
from orchestrator.pairs import PairSet
from solvers.distil.bespoke import rmse_bound_loss
from solvers.families import LearnableFamily
from solvers.families._bespoke import BespokeRungeKutta
from solvers.field import VelocityField


@dataclass(frozen=True)
class RMSEBoundObjective(LocalErrorObjective):
    """Local errors, each weighted by the amplification of all later steps: an upper bound of the samples' RMSE.

    Attributes:
        lipschitz: L_tau, the assumed Lipschitz constant of the velocity.
    """

    lipschitz: float = 1.0
    source = "Shaul et al. 2023 (BST), eq. 26 and Algorithm 3"

    def __post_init__(self) -> None:
        if not self.lipschitz >= 0:
            raise ValueError(f"lipschitz must not be negative, got {self.lipschitz}; the paper uses 1")

    @property
    def label(self) -> str:
        return "RMSE bound" if self.lipschitz == 1 else f"RMSE bound, L={self.lipschitz:g}"

    def per_sample(
        self, family: LearnableFamily, parameters: Tensor, sigma0: float, field: VelocityField, pairs: PairSet
    ) -> Tensor:
        assert isinstance(family, BespokeRungeKutta)
        assert pairs.path is not None
        return rmse_bound_loss(family, parameters, sigma0, field, pairs.path, self.lipschitz, pairs.mask)


OBJECTIVE = RMSEBoundObjective
