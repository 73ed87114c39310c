"""Network predictions to velocities: noise, data, v or velocity, under any scheduler (BNS Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from solvers.field import per_sample
from solvers.scale_time import SchedulerChange
from solvers.schedulers.base import PathPoint, Scheduler

Prediction = Literal["epsilon", "sample", "v_prediction", "velocity"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class Endpoints(NamedTuple):
    """The clean data and the noise a prediction implies, each of the shape of x."""

    data: Tensor
    noise: Tensor


def endpoints_from_velocity(velocity: Tensor, x: Tensor, point: PathPoint) -> Endpoints:
    """x1-hat = (sigma u - sigma' x) / (sigma alpha' - alpha sigma'), eps-hat = (alpha' x - alpha u) / (same).

    Linear in (x, u), so it works on samples and on coefficient vectors alike.
    """
    determinant = point.sigma * point.d_alpha - point.alpha * point.d_sigma
    data = (point.sigma / determinant) * velocity - (point.d_sigma / determinant) * x
    noise = (point.d_alpha / determinant) * x - (point.alpha / determinant) * velocity
    return Endpoints(data, noise)


def endpoints(prediction: Prediction, output: Tensor, x: Tensor, point: PathPoint) -> Endpoints:
    """The data and noise that a network's ``output`` at ``x`` implies.

    Args:
        prediction: What the network predicts. ``v_prediction`` is alpha * eps - sigma * x1 and needs
            alpha^2 + sigma^2 = 1.
        output: The network's output, shape (B, ...).
        x: The network's input, same shape.
        point: The scheduler at the network's time: 0-d, or of a shape that multiplies x, one time a sample.

    Raises:
        ValueError: An unknown prediction, v-prediction on a path that is not variance preserving, or a time at which
            the prediction does not determine the other endpoint.
    """
    alpha, sigma = point.alpha, point.sigma
    blind = {"epsilon": ("data", "alpha", alpha), "sample": ("noise", "sigma", sigma)}.get(prediction)
    if blind is not None and bool((blind[2].detach() == 0).any()):
        raise ValueError(
            f"a prediction of {prediction!r} does not determine the {blind[0]} where {blind[1]} = 0; choose a time "
            f"grid or a domain of the scheduler that leaves this time out"
        )
    match prediction:
        case "epsilon":
            return Endpoints((x - sigma * output) / alpha, output)
        case "sample":
            return Endpoints(output, (x - alpha * output) / sigma)
        case "v_prediction":
            norms = (alpha**2 + sigma**2).detach()
            off = norms[(norms - 1).abs() > 1e-6]
            if len(off):
                raise ValueError(f"v_prediction needs alpha^2 + sigma^2 = 1, got {float(off[0]):.6g}; use 'velocity'")
            return Endpoints(alpha * x - sigma * output, sigma * x + alpha * output)
        case "velocity":
            return endpoints_from_velocity(output, x, point)
    raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")


class PredictionField:
    """The velocity field of a network with any prediction, presented under any scheduler.

    The network runs at its native time; the velocity it implies under ``scheduler`` is
    alpha' x1-hat + sigma' eps-hat, free of the divisions by alpha and sigma that make Table 1's coefficients blow up.
    Presenting a variance-preserving network under ``CondOT`` gives a velocity that is finite on the closed domain.

    Args:
        predict: ``predict(x, t)``: the network at native time ``t``, float64: 0-d, or (B,) where the field is asked so.
        prediction: What it predicts.
        native: The scheduler it was trained with.
        scheduler: The scheduler of the velocity; default ``native``. Its domain is cut to what ``native`` covers.
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
        output = self.predict(native_x, native_t)
        if self.prediction == "velocity" and self.change is None:
            return output
        outer = self.scheduler(t)
        inner = outer if self.change is None else self.native(native_t)
        inner, outer = (PathPoint(*(per_sample(value, x) for value in p)) for p in (inner, outer))
        data, noise = endpoints(self.prediction, output, native_x, inner)
        return outer.d_alpha * data + outer.d_sigma * noise


def velocity_coefficients(prediction: Prediction, point: PathPoint) -> tuple[Tensor, Tensor]:
    """(beta, gamma) with u = beta x + gamma f: Table 1 of the BNS paper.

    They are infinite where the path is singular (epsilon at alpha=0, sample at sigma=0).
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
    raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")
