"""Euler's method with the time shift of large flow models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from solvers.families.base import Family
from solvers.families.euler import Euler
from solvers.field import VelocityField
from solvers.grids import sd3_times, shift_times

Pipeline = Literal["flux", "sd3"]


@dataclass(frozen=True)
class ShiftedEuler(Family):
    """Euler for flow models on any grid, with its times shifted by r -> r / (shift - (shift - 1) r).

    r is the relative position of a time between the first and the last time of the grid. shift > 1 spends more steps
    near the noise, as needed at high resolution; shift = 1 is Euler. On the uniform grid of the cond_ot scheduler this
    is FLUX's sampler, whose shift is e^mu, or with ``pipeline='sd3'`` that of SD3, whose last step is shorter. The grid
    kinds 'shifted' and 'sd3' provide the same times for any family.

    Attributes:
        shift: Strength of the shift, positive; SD3 uses 3.
        pipeline: Whose times: 'flux' or 'sd3' (:func:`solvers.grids.sd3_times`).
    """

    shift: float = 3.0
    pipeline: Pipeline = "flux"
    source = "Esser et al. 2024 (SD3), eq. 23"

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shifted_euler's shift must be positive and finite, got {self.shift}")
        if self.pipeline not in get_args(Pipeline):
            raise ValueError(f"shifted_euler takes pipeline {' or '.join(get_args(Pipeline))}, got {self.pipeline!r}")

    @property
    def label(self) -> str:
        return f"Euler shift={self.shift:g}{' (SD3)' if self.pipeline == 'sd3' else ''}"

    @property
    def order(self) -> int:
        return 1

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        first, last = times[0], times[-1]
        shifting = {"flux": shift_times, "sd3": sd3_times}[self.pipeline]
        shifted = first + (last - first) * shifting((times - first) / (last - first), self.shift)
        # Set the end exactly, since the formula reaches it only to rounding.
        shifted[-1] = last
        return Euler().integrate(velocity, x, shifted)


FAMILY = ShiftedEuler
