"""iPNDM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families._exponential import integrate_multistep
from solvers.families.base import Family
from solvers.field import VelocityField

#: Adams-Bashforth coefficients for equal steps, newest first; one row per number of known predictions.
COEFFICIENTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class IPNDM(Family):
    """iPNDM: DDIM steps with the noise extrapolated from up to four predictions by Adams-Bashforth coefficients.

    The first steps use fewer predictions (PNDM and its PLMS variant in diffusers spend further evaluations there). As
    published, the coefficients are those of equal steps, whatever the grid. On uneven grids the order is therefore
    lower than the name suggests, and second order at best.
    """

    source = "Zhang & Chen 2023 (DEIS), iPNDM; coefficients of Liu et al. 2022 (PNDM), eq. 12"
    label = "iPNDM-4"

    @property
    def order(self) -> int:
        # The coefficients assume equal steps in t, but the step is in sigma/alpha: local error h^3, as at the start.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        def weights(i: int) -> Tensor:
            return torch.tensor(COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)], dtype=torch.float64)

        return integrate_multistep(velocity, x, times, "epsilon", weights)


FAMILY = IPNDM
