"""Multistep DPM-Solver++ of second and third order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.families._exponential import (
    exponential_moments,
    finite_fractions,
    integrate_multistep,
    multistep_order,
    newest_first,
)
from solvers.families._interpolation import moment_weights
from solvers.families.base import Family
from solvers.field import VelocityField


@dataclass(frozen=True)
class DPMppMultistep(Family):
    """Multistep exponential integrator in the data prediction (Lu et al. 2022, DPM-Solver++), variable steps."""

    #: Order of the intermediate steps.
    highest: ClassVar[int]

    @property
    def order(self) -> int:
        # The first and the last step are of first order, and their local error h^2 is never compensated.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        lambdas = velocity.scheduler.lambda_(times)

        def weights(i: int) -> Tensor:
            order = multistep_order(self.highest, i, len(times) - 1, lower_at_end=True)
            if order == 1:
                return torch.ones(1, dtype=torch.float64)
            return dpmpp_weights(order, *finite_fractions(newest_first(lambdas, i, order), lambdas[i + 1]))

        return integrate_multistep(velocity, x, times, "sample", weights)


def dpmpp_weights(order: int, fractions: Tensor, h: Tensor) -> Tensor:
    """Weights of data predictions in the mean of a DPM-Solver++ step of order 2 (midpoint form) or 3.

    Order 2 approximates the mean fraction of the step by 1/2. Order 3 uses the exact mean, but half the mean of the
    square, as the published third-order term does.

    Args:
        order: 2 or 3.
        fractions: (lambda_j - lambda) / h, newest first, so the first is 0; shape (k,), k <= order.
        h: lambda' - lambda, finite.

    Returns:
        Shape (k,), summing to 1.
    """
    one = torch.ones((), dtype=torch.float64)
    if order == 2:
        moments = torch.stack([one, one / 2])
    else:
        # Moments of the distance to the end of the step, converted to moments of the distance from its start.
        _, mean, mean_square = exponential_moments(h, 3)
        moments = torch.stack([one, 1 - mean, (1 - 2 * mean + mean_square) / 2])
    return moment_weights(fractions, moments[: len(fractions)])
