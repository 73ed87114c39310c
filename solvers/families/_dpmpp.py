"""Multistep DPM-Solver++ of second and third order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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

LowerOrderFinal = Literal["below_10", "always", "never"]

FEW_STEPS = 10
"""Number of steps below which the authors' code lowers the order of the last steps; diffusers does below 15."""


@dataclass(frozen=True)
class DPMppMultistep(Family):
    """Multistep exponential integrator in the data prediction (Lu et al. 2022, DPM-Solver++), variable steps.

    Attributes:
        lower_order_final: When the last step has first order and the one before it at most second: 'below_10' steps, as
            in the authors' code, 'always' (stable, but less accurate with more steps) or 'never'. A step to clean data
            (log-SNR = +inf) has first order in any case.
    """

    lower_order_final: LowerOrderFinal = "below_10"

    #: Order of the intermediate steps.
    highest: ClassVar[int]
    #: Short name without options.
    short: ClassVar[str]

    def __post_init__(self) -> None:
        if self.lower_order_final not in get_args(LowerOrderFinal):
            raise ValueError(
                f"{self.short} takes lower_order_final {', '.join(get_args(LowerOrderFinal))}, got "
                f"{self.lower_order_final!r}"
            )

    @property
    def label(self) -> str:
        return self.short if self.lower_order_final == "below_10" else f"{self.short} {self.lower_order_final} lowered"

    @property
    def order(self) -> int | None:
        # The first step has first order, and its local error h^2 is never compensated. It stays below the error of full
        # third order up to about a thousand steps, so the observed order is not 2 there.
        return 2 if self.highest == 2 or self.lower_order_final == "always" else None

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        lambdas = velocity.scheduler.lambda_(times)
        steps = len(times) - 1
        lower = {"below_10": steps < FEW_STEPS, "always": True, "never": False}[self.lower_order_final]

        def weights(i: int) -> Tensor:
            order = multistep_order(self.highest, i, steps, lower_at_end=lower)
            if order == 1 or not bool(torch.isfinite(lambdas[i + 1])):
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
