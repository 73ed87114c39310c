"""Exponential integrators, in coordinates in which every path is straight.

With y = x / (alpha + sigma) and the shares a = alpha / (alpha + sigma), s = sigma / (alpha + sigma) of data and noise,
y = a x1 + s eps on every path, and dy/da = x1-hat - eps-hat. Variation of constants (BNS eq. 22) gives the exact step

    y' = y + (a' - a) <v>

where <v> is the mean, over the step in log-SNR lambda, of the straight velocity that a prediction implies at the start
of the step: (x1-hat - y) / s under the density e^lambda (``sample``), or (y - eps-hat) / a under e^-lambda
(``epsilon``). With a single prediction both are DDIM. The methods differ only in their estimate of the mean: a
weighted sum of predictions at known lambda, with weights that sum to 1.

In this form a step is finite even if lambda is not (only the noise of an earlier state cannot be used at a = 0). It
also avoids the cancellation of (alpha'/alpha) x against the noise, which would cost a step from alpha = 1e-5 to 0.1
four of float32's seven digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from solvers.families._interpolation import moment_weights, weighted_sum
from solvers.families.base import as_dtype
from solvers.field import VelocityField
from solvers.prediction import endpoints_from_velocity
from solvers.schedulers.base import Scheduler

EndpointPrediction = Literal["epsilon", "sample"]

SERIES_TERMS = 20
"""Terms of the series of e^-h, used below h = 1, where the recursion cancels; the first omitted one is below 1e-18."""


def check_prediction(family: str, prediction: str) -> None:
    """Check that exponential integrators support a prediction type.

    Raises:
        ValueError: ``prediction`` is neither 'epsilon' nor 'sample'.
    """
    if prediction not in get_args(EndpointPrediction):
        raise ValueError(f"{family} takes prediction 'epsilon' or 'sample', got {prediction!r}")


def check_count(family: str, option: str, value: int, first: int, last: int) -> None:
    """Check that an integer option lies in its range.

    Raises:
        ValueError: ``value`` is not one of ``first`` … ``last``.
    """
    if value not in range(first, last + 1):
        raise ValueError(f"{family} takes {option} from {first} to {last}, got {value!r}")


class StraightPoint(NamedTuple):
    """A point of the straight path: alpha + sigma, and the shares a of data and s of noise; 0-d float64 tensors."""

    scale: Tensor
    data: Tensor
    noise: Tensor


def straight_point(scheduler: Scheduler, t: Tensor) -> StraightPoint:
    """The point of the straight path that corresponds to ``scheduler`` at ``t``."""
    point = scheduler(t)
    scale = point.alpha + point.sigma
    return StraightPoint(scale, point.alpha / scale, point.sigma / scale)


def enter(x: Tensor, at: StraightPoint) -> Tensor:
    """The straight state y = x / (alpha + sigma)."""
    return x / as_dtype(at.scale, x)


def leave(y: Tensor, at: StraightPoint) -> Tensor:
    """The state x = (alpha + sigma) y."""
    return y * as_dtype(at.scale, y)


def straight_velocity(field: VelocityField, y: Tensor, t: Tensor) -> Tensor:
    """dy/da = x1-hat - eps-hat at the straight state ``y`` and time ``t``; one evaluation."""
    x = leave(y, straight_point(field.scheduler, t))
    data, noise = endpoints_from_velocity(field(x, t), x, field.scheduler(t))
    return data - noise


def implied_elsewhere(
    prediction: EndpointPrediction, velocity: Tensor, displacement: Tensor, at: StraightPoint, to: StraightPoint
) -> Tensor:
    """Convert the straight velocity that a prediction implies at one state to the one it implies at another.

    The prediction, x1-hat = y + s v or eps-hat = y - a v, is held constant.

    Args:
        prediction: The prediction that is held.
        velocity: The straight velocity v at the first state.
        displacement: The second state minus the first.
        at: Point of the first state.
        to: Point of the second state; not pure noise for ``epsilon``, not clean data for ``sample``.
    """
    if prediction == "epsilon":
        return (as_dtype(at.data, velocity) * velocity + displacement) / as_dtype(to.data, velocity)
    return (as_dtype(at.noise, velocity) * velocity - displacement) / as_dtype(to.noise, velocity)


def displacement_to(start: StraightPoint, end: StraightPoint, weights: Tensor, known: list[Tensor]) -> Tensor:
    """(a' - a) <v>, where <v> weights the first velocities in ``known``, as implied at the start, by ``weights``."""
    mean = weighted_sum(weights, known[: len(weights)])
    return as_dtype(end.data - start.data, mean) * mean


def integrate_multistep(
    field: VelocityField,
    x: Tensor,
    times: Tensor,
    prediction: EndpointPrediction,
    weights: Callable[[int], Tensor],
) -> Tensor:
    """Integrate by a multistep method: one evaluation per step, averaged with earlier predictions.

    Args:
        field, x, times: As in :meth:`solvers.families.base.Family.integrate`.
        prediction: Prediction in which past evaluations are held.
        weights: Returns the weights of step i, shape (k,), k <= i + 1, newest prediction first; the first step has
            one.
    """
    points = [straight_point(field.scheduler, t) for t in times]
    y, known = enter(x, points[0]), list[Tensor]()
    for i, (start, end) in enumerate(pairwise(points)):
        used = weights(i)
        known = [straight_velocity(field, y, times[i]), *known][: len(used)]
        displacement = displacement_to(start, end, used, known)
        y = y + displacement
        if i + 2 < len(points):
            known = [implied_elsewhere(prediction, v, displacement, start, end) for v in known]
    return leave(y, points[-1])


def multistep_order(highest: int, step: int, steps: int, *, lower_at_end: bool) -> int:
    """Order of step ``step`` of ``steps``, limited by the predictions known and, optionally, the steps left."""
    order = min(highest, step + 1)
    return min(order, steps - step) if lower_at_end else order


def newest_first(values: Tensor, step: int, count: int) -> Tensor:
    """The last ``count`` of the grid's ``values`` up to the start of step ``step``, newest first."""
    return values[step - count + 1 : step + 1].flip(0)


def exponential_moments(h: Tensor, count: int) -> Tensor:
    """Moments E[v^k], k = 0 … count-1, of v in [0, 1] under the density proportional to e^(-h v).

    Args:
        h: Step in log-SNR, 0-d float64, non-negative and finite; 0 gives 1/(k+1).

    Returns:
        Shape (count,), float64, accurate to rounding for every h.
    """
    if float(h.detach()) < 1:
        n = torch.arange(SERIES_TERMS, dtype=torch.float64)
        terms = (-h) ** n / torch.exp(torch.lgamma(n + 1))
        integrals = torch.stack([(terms / (n + k + 1)).sum() for k in range(count)])
    else:
        integral = -torch.expm1(-h) / h
        unnormalised = [integral]
        for k in range(1, count):
            integral = (k * integral - torch.exp(-h)) / h
            unnormalised.append(integral)
        integrals = torch.stack(unnormalised)
    return integrals / integrals[0]


def mean_weights(prediction: EndpointPrediction, fractions: Tensor, h: Tensor) -> Tensor:
    """Weights of predictions in <v>: the exact mean of their interpolation polynomial in lambda.

    Args:
        prediction: The prediction that is interpolated.
        fractions: Positions of the predictions, (lambda_j - lambda) / h: 0 at the start of the step, 1 at its end,
            negative before. Shape (k,), float64, distinct.
        h: lambda' - lambda, 0-d float64, finite.

    Returns:
        Shape (k,), summing to 1.
    """
    # Measured from the end of the step at which the density is largest, so that it is e^(-h v) for both predictions.
    v = fractions if prediction == "epsilon" else 1 - fractions
    return moment_weights(v, exponential_moments(h, len(fractions)))


def finite_fractions(lambdas: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of past predictions in units of the step from ``lambdas[0]`` to ``end``, and the step length h.

    A prediction at lambda = -inf is omitted, since weight 0 is the limit of the interpolation.

    Args:
        lambdas: Shape (k,), float64, newest first; the first is finite, and only the last may be infinite.
        end: 0-d float64, finite.

    Returns:
        (lambda_j - lambdas[0]) / h for finite lambda_j, and h.
    """
    h = end - lambdas[0]
    return (lambdas[torch.isfinite(lambdas)] - lambdas[0]) / h, h


def history_weights(prediction: EndpointPrediction, lambdas: Tensor, end: Tensor) -> Tensor:
    """Weights of the predictions at ``lambdas`` in <v> over the step from ``lambdas[0]`` to ``end``.

    At ``end`` = +inf the noise prediction is extrapolated as on other steps (the mean of v^k under e^-v is k!); the
    data prediction cannot be extrapolated and is held.

    Args:
        prediction: The prediction that is extrapolated.
        lambdas: As in :func:`finite_fractions`, but a single one may be -inf.
        end: 0-d float64, finite or +inf.

    Returns:
        Weights of the first (newest) predictions, summing to 1; the others are not used.
    """
    if len(lambdas) == 1:
        return torch.ones(1, dtype=torch.float64)
    if bool(torch.isfinite(end)):
        return mean_weights(prediction, *finite_fractions(lambdas, end))
    if prediction == "sample":
        return torch.ones(1, dtype=torch.float64)
    distances, _ = finite_fractions(lambdas, lambdas[0] + 1)
    factorials = [float(math.factorial(k)) for k in range(len(distances))]
    return moment_weights(distances, torch.tensor(factorials, dtype=torch.float64))


class SingleStep:
    """One step of an exponential Runge-Kutta method, from ``t`` to ``t_next``.

    A stage lies at a fraction c of the step in log-SNR. A step that begins in pure noise (lambda = -inf) is taken in
    e^lambda = alpha/sigma and the data prediction instead, and one that ends on clean data (lambda = +inf) in
    e^-lambda = sigma/alpha and the noise prediction. In these coordinates the step is finite, and the method becomes
    the classical Runge-Kutta method of the same order, which is the limit h = 0 of the exponential one. A single step
    from pure noise to clean data has its stage at snr = c/(1-c) and is taken in the data prediction.
    """

    def __init__(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, prediction: EndpointPrediction):
        self.field = field
        self.scheduler = field.scheduler
        self.t_next = t_next
        self.start = straight_point(self.scheduler, t)
        self.y = enter(x, self.start)
        self.first, self.last = self.scheduler.lambda_(t), self.scheduler.lambda_(t_next)
        self.from_noise = not bool(torch.isfinite(self.first))
        self.to_data = not bool(torch.isfinite(self.last))
        #: The prediction in which the step is taken.
        self.form: EndpointPrediction = "sample" if self.from_noise else "epsilon" if self.to_data else prediction

    def time_at(self, c: float) -> Tensor:
        """Time of the stage at the fraction ``c`` in (0, 1]; exactly the grid's time at 1."""
        if c == 1:
            return self.t_next
        if self.from_noise and self.to_data:
            return self.scheduler.time_at_lambda(math.log(c / (1 - c)))
        if self.from_noise:
            return self.scheduler.time_at_lambda(self.last + math.log(c))
        if self.to_data:
            return self.scheduler.time_at_lambda(self.first - math.log(1 - c))
        return self.scheduler.time_at_lambda(self.first + c * (self.last - self.first))

    def implied(self, t: Tensor, displacement: Tensor | None = None) -> Tensor:
        """The straight velocity at the start of the step that the prediction at ``t`` implies; one evaluation.

        Args:
            t: Time of the stage.
            displacement: The stage's state minus the start; None for the first stage, which is the start.
        """
        if displacement is None:
            return straight_velocity(self.field, self.y, t)
        velocity = straight_velocity(self.field, self.y + displacement, t)
        return implied_elsewhere(self.form, velocity, -displacement, straight_point(self.scheduler, t), self.start)

    def weights(self, nodes: Sequence[float], c: float) -> Tensor:
        """Weights of predictions at the fractions ``nodes`` in the mean over the step up to the fraction ``c``."""
        infinite = self.from_noise or self.to_data
        h = torch.zeros((), dtype=torch.float64) if infinite else c * (self.last - self.first)
        return mean_weights(self.form, torch.tensor(nodes, dtype=torch.float64) / c, h)

    def displacement(self, t: Tensor, weights: Tensor, known: list[Tensor]) -> Tensor:
        """Displacement from the start of the step to time ``t``: implied velocities ``known``, weighted."""
        return displacement_to(self.start, straight_point(self.scheduler, t), weights, known)

    def end(self, weights: Tensor, known: list[Tensor]) -> Tensor:
        """The state at the end of the step, on the field's path."""
        return leave(
            self.y + self.displacement(self.t_next, weights, known), straight_point(self.scheduler, self.t_next)
        )
