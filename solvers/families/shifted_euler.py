"""Euler's method with the time shift of large flow models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from solvers.families.base import Family
from solvers.families.euler import Euler
from solvers.field import VelocityField
from solvers.grids import shift_times


@dataclass(frozen=True)
class ShiftedEuler(Family):
    """Euler for flow models, on whatever grid it is given, its times shifted: r -> r / (shift - (shift - 1) r).

    r is the share of the way from the grid's first time to its last. shift > 1 spends more steps near the noise, as
    is needed at high resolution; 1 is Euler. On the uniform grid of the cond_ot scheduler this is the sampler of SD3
    and FLUX; the grid kind 'shifted' gives the same times to any family.

    Attributes:
        shift: SD3's value is 3.
    """

    shift: float = 3.0
    source = "Esser et al. 2024 (SD3), eq. 23"

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shifted_euler's shift must be positive and finite, got {self.shift}")

    @property
    def label(self) -> str:
        return f"Euler shift={self.shift:g}"

    @property
    def order(self) -> int:
        return 1

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        first, last = times[0], times[-1]
        shifted = first + (last - first) * shift_times((times - first) / (last - first), self.shift)
        # The end itself, which the formula meets only to rounding.
        shifted[-1] = last
        return Euler().integrate(velocity, x, shifted)


FAMILY = ShiftedEuler
