"""EDM's Heun sampler."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solvers.families._exponential import SingleStep
from solvers.families.base import Family
from solvers.field import VelocityField


@dataclass(frozen=True)
class EDMHeun(Family):
    """Heun's method on d(x/alpha) / d(sigma/alpha), the coordinates of EDM, with an Euler step at the end.

    Deterministic Algorithm 1 of Karras et al. (S_churn = 0). N steps make 2N - 1 evaluations: the last step, to
    sigma = 0 in the paper, is an Euler step, even on a domain that ends before sigma = 0. A first step from pure
    noise, where sigma/alpha is infinite, is a Heun step on d(x/sigma) / d(alpha/sigma) instead; EDM itself starts at
    sigma = 80. The family 'heun' differs: it steps on u_t.
    """

    source = "Karras et al. 2022 (EDM), Algorithm 1 with S_churn = 0"
    label = "EDM Heun"

    @property
    def order(self) -> int:
        # Heun's order; the local error h^2 of the last step is of the same size.
        return 2

    @property
    def evaluations_per_step(self) -> int:
        """Two, except for the last step, which has one; :meth:`steps` converts an NFE to steps."""
        return 2

    def steps(self, nfe: int) -> int:
        """Number of grid steps that take ``nfe`` evaluations, (nfe + 1) / 2.

        Raises:
            ValueError: ``nfe`` is even or not positive.
        """
        if nfe < 1 or nfe % 2 == 0:
            nearest = max(1, nfe - 1)
            raise ValueError(
                f"{self.label} makes 2N-1 evaluations in N steps, so its NFE must be a positive multiple of 2 minus "
                f"one, got {nfe}; use {nearest} or {nearest + 2}"
            )
        return (nfe + 1) // 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        euler, heun = (torch.tensor(weights, dtype=torch.float64) for weights in ((1.0,), (0.5, 0.5)))
        for i, (t, t_next) in enumerate(pairwise(times), start=1):
            step = SingleStep(velocity, x, t, t_next, "epsilon")
            known = [step.implied(t)]
            if i == len(times) - 1:
                return step.end(euler, known)
            known.append(step.implied(t_next, step.displacement(t_next, euler, known)))
            x = step.end(heun, known)
        return x


FAMILY = EDMHeun
