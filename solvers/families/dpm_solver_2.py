"""DPM-Solver-2."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solvers.families._exponential import SingleStep
from solvers.families.base import Family
from solvers.field import VelocityField


@dataclass(frozen=True)
class DPMSolver2(Family):
    """Singlestep exponential midpoint rule in the noise prediction, r = 1/2: second order, two evaluations a step.

    The stage is DDIM's at the middle of the step in log-SNR, where sigma/alpha is the geometric mean of its ends; the
    step takes the stage's noise alone. A step that begins in pure noise has its stage at the middle of alpha/sigma
    and takes the data prediction, one that ends on clean data at the middle of sigma/alpha: log-SNR is infinite there.
    The reference implementation has no such steps: it ends at sigma > 0 (diffusers' last step to sigma = 0 is DDIM's).
    """

    source = "Lu et al. 2022 (DPM-Solver), Algorithm 1"
    label = "DPM-Solver-2"
    order = 2

    @property
    def evaluations_per_step(self) -> int:
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        for t, t_next in pairwise(times):
            step = SingleStep(velocity, x, t, t_next, "epsilon")
            middle = step.time_at(0.5)
            whole = torch.ones(1, dtype=torch.float64)
            first = step.implied(t)
            second = step.implied(middle, step.displacement(middle, whole, [first]))
            x = step.end(whole, [second])
        return x


FAMILY = DPMSolver2
