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
    """Euler for flow models on any grid, with its times shifted by r -> r / (shift - (shift - 1) r).

    r is the relative position of a time between the first and the last time of the grid. shift > 1 spends more steps
    near the noise, as needed at high resolution; shift = 1 is Euler. On the uniform grid of the cond_ot scheduler this
    is the sampler of SD3 and FLUX. The grid kind 'shifted' provides the same times for any family.

    Attributes:
        shift: Strength of the shift, positive; SD3 uses 3.
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
        # Set the end exactly, since the formula reaches it only to rounding.
        shifted[-1] = last
        return Euler().integrate(velocity, x, shifted)


FAMILY = ShiftedEuler
