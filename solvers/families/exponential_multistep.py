"""Exponential Adams-Bashforth methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.families._exponential import (
    EndpointPrediction,
    check_count,
    check_prediction,
    history_weights,
    integrate_multistep,
    multistep_order,
    newest_first,
)
from solvers.families.base import Family
from solvers.field import VelocityField


@dataclass(frozen=True)
class ExponentialMultistep(Family):
    """Exponential Adams-Bashforth in the noise or data prediction, with exact variable-step coefficients.

    A step is exact for the polynomial in log-SNR through the last predictions. The first steps have lower order, until
    enough predictions are known. The intermediate steps equal those of DPM-Solver++ (solver_type='heun') and DEIS
    ('logrho') in diffusers; unlike them, this family keeps its order at the end. With one prediction it is DDIM, for
    both kinds.

    A prediction in pure noise (log-SNR = -inf) has no weight, so the steps after it lose one order. The last step to
    clean data (log-SNR = +inf) extrapolates the noise prediction as usual, but in the data prediction it is a DDIM
    step.

    Attributes:
        steps_back: Number of predictions used, 1 to 3.
        prediction: The prediction that is extrapolated, 'epsilon' or 'sample'.
    """

    steps_back: int = 3
    prediction: EndpointPrediction = "sample"
    source = "Hochbruck & Ostermann 2010, section 2; Zhang & Chen 2023 (DEIS), eq. 14-15, in log-SNR"

    def __post_init__(self) -> None:
        check_count("exponential_multistep", "steps_back", self.steps_back, 1, 3)
        check_prediction("exponential_multistep", self.prediction)

    @property
    def label(self) -> str:
        return f"ExpAB{self.steps_back} {self.prediction}"

    @property
    def order(self) -> int | None:
        # The first step can only be a DDIM step, whose local error h^2 is never compensated. With three predictions
        # that error stays below the third-order remainder up to about a thousand steps, so the observed order is not 2.
        return None if self.steps_back == 3 else self.steps_back

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        lambdas = velocity.scheduler.lambda_(times)

        def weights(i: int) -> Tensor:
            order = multistep_order(self.steps_back, i, len(times) - 1, lower_at_end=False)
            return history_weights(self.prediction, newest_first(lambdas, i, order), lambdas[i + 1])

        return integrate_multistep(velocity, x, times, self.prediction, weights)


FAMILY = ExponentialMultistep
