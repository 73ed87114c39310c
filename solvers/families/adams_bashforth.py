"""Adams-Bashforth multistep methods with variable-step coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solvers.families._interpolation import moment_weights
from solvers.families.base import Family, as_dtype
from solvers.field import VelocityField


@dataclass(frozen=True)
class AdamsBashforth(Family):
    """Adams-Bashforth on u_t: integrates the interpolation polynomial of the last velocities exactly over the step.

    The first steps have lower order, until enough velocities are known. Each steps from x_i (BNS eq. 52 prints
    x_{i-m+1}).

    Attributes:
        steps_back: Number of velocities used, 2 to 4.
    """

    steps_back: int = 2
    source = "BNS appendix C, eq. 52 (corrected)"

    def __post_init__(self) -> None:
        if self.steps_back not in (2, 3, 4):
            raise ValueError(f"adams_bashforth takes steps_back 2, 3 or 4, got {self.steps_back}")

    @property
    def label(self) -> str:
        return f"AB{self.steps_back}"

    @property
    def order(self) -> int:
        # The first step can only be an Euler step, whose local error h^2 no later step compensates.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        velocities: list[Tensor] = []
        for i, (t, t_next) in enumerate(pairwise(times)):
            velocities.append(velocity(x, t))
            known = min(self.steps_back, i + 1)
            nodes = times[i - known + 1 : i + 1].flip(0)
            for weight, past in zip(variable_step_weights(nodes, t, t_next), reversed(velocities), strict=False):
                x = x + as_dtype(weight, x) * past
        return x


def variable_step_weights(nodes: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Weights w with sum_j w_j p(nodes_j) = integral of p over [t, t_next] for polynomials of degree < len(nodes).

    Args:
        nodes: Distinct times, newest first, shape (k,), float64.
        t: Start of the step, 0-d float64.
        t_next: End of the step, 0-d float64.
    """
    step = t_next - t
    degrees = torch.arange(len(nodes), dtype=torch.float64)
    # In units of the step and with the origin at t, the system is well conditioned for every grid.
    return step * moment_weights((nodes - t) / step, 1 / (degrees + 1))


FAMILY = AdamsBashforth
