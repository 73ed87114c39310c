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
    """Singlestep exponential midpoint rule in the noise prediction, r = 1/2: second order, two evaluations per step.

    The stage is a DDIM step to the middle of the step in log-SNR, where sigma/alpha is the geometric mean of its ends.
    The full step uses only the stage's noise prediction. If log-SNR is infinite at an end, the stage lies elsewhere: a
    step from pure noise has it at the middle of alpha/sigma and uses the data prediction, a step to clean data at the
    middle of sigma/alpha. The reference implementation has no such steps, since it ends at sigma > 0 (the last step of
    diffusers, to sigma = 0, is a DDIM step).
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
            weight = torch.ones(1, dtype=torch.float64)
            first = step.implied(t)
            second = step.implied(middle, step.displacement(middle, weight, [first]))
            x = step.end(weight, [second])
        return x


FAMILY = DPMSolver2
