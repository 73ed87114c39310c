"""DPM-Solver++(2M)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.families.base import Family, as_dtype
from solvers.field import VelocityField
from solvers.prediction import endpoints_from_velocity


@dataclass(frozen=True)
class DPMpp2M(Family):
    """Second-order multistep exponential integrator in the data prediction (Lu et al. 2022b, Algorithm 2).

    The first and the last step are of first order, as in the reference implementation for few steps. Steps that begin
    or end where log-SNR is infinite fall to first order by the formula itself.
    """

    source = "Lu et al. 2022 (DPM-Solver++), Algorithm 2"
    label = "DPM++(2M)"
    order = 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        scheduler = velocity.scheduler
        lambdas = scheduler.lambda_(times)
        previous: Tensor | None = None
        steps = len(times) - 1
        for i in range(steps):
            point, target = scheduler(times[i]), scheduler(times[i + 1])
            data, _ = endpoints_from_velocity(velocity(x, times[i]), x, point)
            estimate = data
            if previous is not None and i < steps - 1:
                # 1/(2r) with r = h_{i-1} / h_i: 0 after a step of infinite length in log-SNR.
                correction = (lambdas[i + 1] - lambdas[i]) / (2 * (lambdas[i] - lambdas[i - 1]))
                if not bool(torch.isfinite(correction)):
                    correction = torch.zeros(())
                estimate = data + as_dtype(correction, x) * (data - previous)
            # alpha' (1 - e^-h) with e^-h = (alpha sigma') / (sigma alpha'), finite for infinite h.
            weight = target.alpha - point.alpha * target.sigma / point.sigma
            x = as_dtype(target.sigma / point.sigma, x) * x + as_dtype(weight, x) * estimate
            previous = data
        return x


FAMILY = DPMpp2M
