"""Exponential Runge-Kutta methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from solvers.families._exponential import EndpointPrediction, SingleStep, check_count, check_prediction
from solvers.families.base import Family
from solvers.field import VelocityField

#: Fractions of the step in log-SNR at which the stages lie, by order.
NODES: dict[int, tuple[float, ...]] = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}


@dataclass(frozen=True)
class ExponentialRK(Family):
    """Exponential Runge-Kutta in the noise or data prediction: order 1 to 3, with as many evaluations per step.

    Each stage, and the step itself, is exact for the polynomial in log-SNR through the predictions made so far in the
    step. Order 1 is DDIM for both predictions. Order 2 differs from DPM-Solver-2, whose step uses the last prediction
    alone. On steps from pure noise or to clean data, where log-SNR is infinite, it is the classical Runge-Kutta method
    of the same nodes (midpoint, Heun's third-order method) in alpha/sigma or sigma/alpha, for either prediction.

    The singlestep DPM-Solver of diffusers with solver_type='heun' is this method on a grid of all its stages; there
    the last step, to sigma = 0, is a DDIM step.

    Attributes:
        order: Number of stages, and order of convergence, 1 to 3.
        prediction: The prediction that is interpolated, 'epsilon' (DPM-Solver) or 'sample' (DPM-Solver++).
    """

    order: int = 3
    prediction: EndpointPrediction = "sample"
    source = "Hochbruck & Ostermann 2010, section 2; stages of Lu et al. 2022 (DPM-Solver-3)"

    def __post_init__(self) -> None:
        check_count("exponential_rk", "order", self.order, 1, 3)
        check_prediction("exponential_rk", self.prediction)

    @property
    def label(self) -> str:
        return f"ExpRK{self.order} {self.prediction}"

    @property
    def evaluations_per_step(self) -> int:
        return self.order

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        nodes = NODES[self.order]
        for t, t_next in pairwise(times):
            step = SingleStep(velocity, x, t, t_next, self.prediction)
            known = [step.implied(t)]
            for c in nodes[1:]:
                time = step.time_at(c)
                known.append(step.implied(time, step.displacement(time, step.weights(nodes[: len(known)], c), known)))
            x = step.end(step.weights(nodes, 1.0), known)
        return x


FAMILY = ExponentialRK
