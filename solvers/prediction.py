"""Converts network predictions (noise, data, v, score, …) to velocities under any scheduler (BNS Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from solvers.field import per_sample
from solvers.scale_time import SchedulerChange
from solvers.schedulers.base import PathPoint, Scheduler

Prediction = Literal["epsilon", "sample", "v_prediction", "velocity", "score", "noise_minus_data"]
"""What a network predicts of x = alpha x1 + sigma eps, with derivatives in t, which runs from noise (0) to data (1):

- ``epsilon``: eps. ``sample``: x1. ``v_prediction``: alpha eps - sigma x1, on paths with alpha^2 + sigma^2 = 1.
- ``velocity``: alpha' x1 + sigma' eps = dx/dt; x1 - eps on the path of CondOT.
- ``score``: the gradient of log p_t(x), -eps / sigma.
- ``noise_minus_data``: eps - x1 on any path; on CondOT it is the negative velocity, as rectified flows that count time
  from the data (x = (1 - s) x1 + s eps, dx/ds) predict.
"""

PREDICTIONS: tuple[str, ...] = get_args(Prediction)

UNDETERMINED: dict[str, tuple[str, ...]] = {"epsilon": ("alpha",), "sample": ("sigma",), "score": ("alpha", "sigma")}
"""The coefficients that must not be 0 for a prediction to determine both the data and the noise."""


def check_path(prediction: Prediction, native: Scheduler) -> None:
    """Check that a prediction determines the velocity on the whole domain of a scheduler.

    Raises:
        ValueError: It does not; the message names the remedy.
    """
    first, last = native(native.t_min), native(native.t_max)
    undetermined = UNDETERMINED.get(prediction, ())
    if "alpha" in undetermined and float(first.alpha) == 0:
        raise ValueError(
            f"{_article(prediction)} prediction on {native.name!r} does not determine the data where sampling starts, "
            f"t={native.t_min:g}: alpha is 0 there, so the velocity is infinite; set prediction to 'velocity' for a "
            f"flow network, or start later with the scheduler's option t_min, e.g. 0.001"
        )
    if "sigma" in undetermined and float(last.sigma) == 0:
        raise ValueError(
            f"{_article(prediction)} prediction on {native.name!r} does not determine the noise where sampling ends, "
            f"t={native.t_max:g}: sigma is 0 there, so the velocity is infinite; end earlier with the scheduler's "
            f"option t_max, e.g. 0.999"
        )
    if prediction == "v_prediction":
        point = native(torch.linspace(native.t_min, native.t_max, 9, dtype=torch.float64))
        norms = point.alpha**2 + point.sigma**2
        if bool(((norms - 1).abs() > 1e-6).any()):
            raise ValueError(
                f"v_prediction needs alpha^2 + sigma^2 = 1, but {native.name!r} has "
                f"{float(norms[(norms - 1).abs().argmax()]):.6g}; choose vp, discrete_vp or cosine, or the prediction "
                f"'velocity'"
            )


def _article(prediction: str) -> str:
    return f"an {prediction}" if prediction == "epsilon" else f"a {prediction}"


class Endpoints(NamedTuple):
    """The clean data and the noise that a prediction implies, each with the shape of x."""

    data: Tensor
    noise: Tensor


def endpoints_from_velocity(velocity: Tensor, x: Tensor, point: PathPoint) -> Endpoints:
    """x1-hat = (sigma u - sigma' x) / (sigma alpha' - alpha sigma'), eps-hat = (alpha' x - alpha u) / (same).

    It is linear in (x, u), so it works on both samples and coefficient vectors.
    """
    determinant = point.sigma * point.d_alpha - point.alpha * point.d_sigma
    data = (point.sigma / determinant) * velocity - (point.d_sigma / determinant) * x
    noise = (point.d_alpha / determinant) * x - (point.alpha / determinant) * velocity
    return Endpoints(data, noise)


def endpoints(prediction: Prediction, output: Tensor, x: Tensor, point: PathPoint) -> Endpoints:
    """The data and noise that a network's ``output`` at ``x`` implies.

    Args:
        prediction: What the network predicts, see :data:`Prediction`.
        output: The network's output, shape (B, ...).
        x: The network's input, same shape.
        point: The scheduler at the network's time: 0-d, or one time per sample in a shape that broadcasts with x.

    Raises:
        ValueError: The prediction is unknown, v-prediction is used on a path that is not variance preserving, or the
            prediction does not determine the other endpoint at this time.
    """
    alpha, sigma = point.alpha, point.sigma
    for name in UNDETERMINED.get(prediction, ()):
        if bool((getattr(point, name).detach() == 0).any()):
            raise ValueError(
                f"a prediction of {prediction!r} does not determine the {'data' if name == 'alpha' else 'noise'} where "
                f"{name} = 0; choose a time grid or a domain of the scheduler that leaves this time out"
            )
    match prediction:
        case "epsilon":
            return Endpoints((x - sigma * output) / alpha, output)
        case "sample":
            return Endpoints(output, (x - alpha * output) / sigma)
        case "v_prediction":
            norms = (alpha**2 + sigma**2).detach()
            wrong_norms = norms[(norms - 1).abs() > 1e-6]
            if len(wrong_norms):
                raise ValueError(
                    f"v_prediction needs alpha^2 + sigma^2 = 1, got {float(wrong_norms[0]):.6g}; use 'velocity'"
                )
            return Endpoints(alpha * x - sigma * output, sigma * x + alpha * output)
        case "velocity":
            return endpoints_from_velocity(output, x, point)
        case "score":
            return Endpoints((x + sigma**2 * output) / alpha, -sigma * output)
        case "noise_minus_data":
            total = alpha + sigma
            return Endpoints((x - sigma * output) / total, (x + alpha * output) / total)
    raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")


class PredictionField:
    """The velocity field of a network with any prediction, presented under any scheduler.

    The network runs at its native time. The velocity it implies under ``scheduler`` is alpha' x1-hat + sigma' eps-hat,
    without the divisions by alpha and sigma that make Table 1's coefficients blow up. A variance-preserving network
    presented under ``CondOT`` has a velocity that is finite on the closed domain.

    Args:
        predict: ``predict(x, t)`` returns the network's output at native time ``t``, float64: 0-d, or (B,) if the field
            is called with one time per sample. It gets copies, so it may change them in place, and its output is not
            kept, so it may reuse that memory.
        prediction: The quantity that the network predicts.
        native: The scheduler that the network was trained with.
        scheduler: The scheduler of the velocity; default ``native``. Its domain is cut to the part that ``native``
            covers.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        prediction: Prediction,
        native: Scheduler,
        scheduler: Scheduler | None = None,
    ):
        self.predict = predict
        self.prediction = prediction
        self.native = native
        self.change = None if scheduler is None or scheduler == native else SchedulerChange(native, scheduler)
        self.scheduler = native if self.change is None else self.change.target

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scheduler.check_velocity_time(t)
        if self.change is None:
            native_t, native_x = t, x
        else:
            native_t, scale = self.change.time_and_scale(t)
            native_x = x / per_sample(scale, x)
        output = self.predict(native_x.clone(), native_t.clone())
        if self.prediction == "velocity" and self.change is None:
            return output.clone()
        outer = self.scheduler(t)
        inner = outer if self.change is None else self.native(native_t)
        inner, outer = (PathPoint(*(per_sample(value, x) for value in p)) for p in (inner, outer))
        data, noise = endpoints(self.prediction, output, native_x, inner)
        return outer.d_alpha * data + outer.d_sigma * noise


def velocity_coefficients(prediction: Prediction, point: PathPoint) -> tuple[Tensor, Tensor]:
    """(beta, gamma) with u = beta x + gamma f: Table 1 of the BNS paper, and two more predictions.

    They are infinite where the path is singular (epsilon and score at alpha=0, sample at sigma=0).
    """
    alpha, sigma, d_alpha, d_sigma = point
    match prediction:
        case "velocity":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "epsilon":
            return d_alpha / alpha, (d_sigma * alpha - sigma * d_alpha) / alpha
        case "sample":
            return d_sigma / sigma, (sigma * d_alpha - d_sigma * alpha) / sigma
        case "v_prediction":
            return torch.zeros_like(alpha), d_sigma * alpha - d_alpha * sigma
        case "score":
            return d_alpha / alpha, -sigma * (d_sigma * alpha - sigma * d_alpha) / alpha
        case "noise_minus_data":
            return (d_alpha + d_sigma) / (alpha + sigma), (d_sigma * alpha - sigma * d_alpha) / (alpha + sigma)
    raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")
