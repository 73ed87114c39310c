"""DDIM, the first-order exponential integrator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from solvers.families.base import Family, as_dtype
from solvers.field import VelocityField
from solvers.prediction import endpoints_from_velocity


@dataclass(frozen=True)
class DDIM(Family):
    """Deterministic DDIM, x' = alpha' x1-hat + sigma' eps-hat: first order (Song et al. 2021).

    The result depends on the scheduler only through the SNR at the grid's times.
    """

    source = "Song et al. 2021, eq. 12 with eta = 0"
    label = "DDIM"
    order = 1

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        for t, t_next in pairwise(times):
            data, noise = endpoints_from_velocity(velocity(x, t), x, velocity.scheduler(t))
            target = velocity.scheduler(t_next)
            x = as_dtype(target.alpha, x) * data + as_dtype(target.sigma, x) * noise
        return x


FAMILY = DDIM
