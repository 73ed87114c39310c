"""iPNDM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families._exponential import integrate_multistep
from solvers.families.base import Family
from solvers.field import VelocityField

#: Adams-Bashforth coefficients for equal steps, newest first, by the number of predictions known.
COEFFICIENTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class IPNDM(Family):
    """iPNDM: DDIM's step with the noise extrapolated by equal-step Adams-Bashforth coefficients, up to four of them.

    It starts with fewer predictions (PNDM and its PLMS variant in diffusers spend further evaluations there). The
    coefficients are those of equal steps whatever the grid, as published: on uneven grids it is of lower order than
    its name says, and of second order at best.
    """

    source = "Zhang & Chen 2023 (DEIS), iPNDM; coefficients of Liu et al. 2022 (PNDM), eq. 12"
    label = "iPNDM-4"

    @property
    def order(self) -> int:
        # Equal-step coefficients weigh the noise by t and the step by sigma/alpha: local error h^3, as at the start.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        def weights(i: int) -> Tensor:
            return torch.tensor(COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)], dtype=torch.float64)

        return integrate_multistep(velocity, x, times, "epsilon", weights)


FAMILY = IPNDM
