"""The local truncation error of Bespoke scale-time solvers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.objectives._bespoke import LocalErrorObjective
from orchestrator.pairs import PairSet
from solvers.distil.bespoke import lte_loss
from solvers.families import LearnableFamily
from solvers.families._bespoke import BespokeRungeKutta
from solvers.field import VelocityField


@dataclass(frozen=True)
class LTEObjective(LocalErrorObjective):
    """Local truncation errors of all steps of a scale-time solver, unweighted."""

    source = "Shaul et al. 2023 (BST), Algorithm 5"
    label = "LTE"

    def per_sample(
        self, family: LearnableFamily, parameters: Tensor, sigma0: float, field: VelocityField, pairs: PairSet
    ) -> Tensor:
        assert isinstance(family, BespokeRungeKutta)
        assert pairs.path is not None
        return lte_loss(family, parameters, sigma0, field, pairs.path, pairs.mask)


OBJECTIVE = LTEObjective
