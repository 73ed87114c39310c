"""UniPC."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solvers.families._exponential import (
    check_count,
    displacement_to,
    enter,
    finite_fractions,
    history_weights,
    implied_elsewhere,
    leave,
    mean_weights,
    multistep_order,
    newest_first,
    straight_point,
    straight_velocity,
)
from solvers.families._interpolation import moment_weights
from solvers.families.base import Family
from solvers.field import VelocityField


@dataclass(frozen=True)
class UniPC(Family):
    """UniPC-p with B(h) = e^h - 1 ('bh2') in the data prediction: a multistep predictor with a free corrector.

    The prediction made for the next step also corrects the state at which it was made: the step is repeated with the
    polynomial through that prediction. The last state is not corrected. The first steps have lower order, and so do
    the last ones, as in the reference implementation: the final step is a DDIM step.

    A prediction in pure noise (log-SNR = -inf) has no weight, so the steps after it lose one order.

    Attributes:
        steps_back: p, the order of the predictor and the number of predictions it uses, 1 to 3; the corrector uses
            one more.
    """

    steps_back: int = 3
    source = "Zhao et al. 2023 (UniPC), in the data prediction with B(h) = e^h - 1"

    def __post_init__(self) -> None:
        check_count("unipc", "steps_back", self.steps_back, 1, 3)

    @property
    def label(self) -> str:
        return f"UniPC-{self.steps_back}"

    @property
    def order(self) -> int:
        # The last step has first order and is not corrected.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        lambdas = velocity.scheduler.lambda_(times)
        points = [straight_point(velocity.scheduler, t) for t in times]
        steps = len(times) - 1
        y = enter(x, points[0])
        known = [straight_velocity(velocity, y, times[0])]
        for i, (start, end) in enumerate(pairwise(points)):
            order = multistep_order(self.steps_back, i, steps, lower_at_end=True)
            recent = newest_first(lambdas, i, order)
            guess = displacement_to(start, end, predictor_weights(recent, lambdas[i + 1]), known)
            if i == steps - 1:
                y = y + guess
                break
            ahead = straight_velocity(velocity, y + guess, times[i + 1])
            # The corrected state keeps the prediction made at the guess: it costs no evaluation.
            known = [implied_elsewhere("sample", ahead, -guess, end, start), *known][: self.steps_back + 1]
            corrected = displacement_to(start, end, corrector_weights(recent, lambdas[i + 1]), known)
            y = y + corrected
            known = [implied_elsewhere("sample", v, corrected, start, end) for v in known]
        return leave(y, points[-1])


def predictor_weights(lambdas: Tensor, end: Tensor) -> Tensor:
    """Weights of the data predictions at ``lambdas`` (newest first) in UniP's step from ``lambdas[0]`` to ``end``.

    With two predictions the mean fraction of the step is approximated by 1/2; with three the moments are exact.
    """
    if len(lambdas) == 2:
        fractions, _ = finite_fractions(lambdas, end)
        return moment_weights(fractions, torch.tensor([1.0, 0.5], dtype=torch.float64)[: len(fractions)])
    return history_weights("sample", lambdas, end)


def corrector_weights(lambdas: Tensor, end: Tensor) -> Tensor:
    """Weights in UniC's step of the prediction at its ``end``, followed by those at ``lambdas`` (newest first).

    With one past prediction the two have equal weights; with more the moments of the step are exact.
    """
    if len(lambdas) == 1:
        return torch.full((2,), 0.5, dtype=torch.float64)
    fractions, h = finite_fractions(lambdas, end)
    return mean_weights("sample", torch.cat([torch.ones(1, dtype=torch.float64), fractions]), h)


FAMILY = UniPC
