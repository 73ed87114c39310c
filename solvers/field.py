"""Velocity fields: what a solver is given, with guidance and evaluation counting as wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from solvers.schedulers.base import Scheduler


class VelocityField(Protocol):
    """The right-hand side u_t(x) of the sampling ODE dx/dt = u_t(x), with t=0 noise and t=1 data.

    ``scheduler`` names the Gaussian path that u belongs to; its ``t_min`` is where sampling starts, from
    ``scheduler.sigma(t_min) * x0`` with x0 ~ N(0, I).
    """

    @property
    def scheduler(self) -> Scheduler: ...

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x) of the shape and dtype of ``x``; ``t`` is a 0-d float64 tensor."""
        ...


class FunctionField:
    """A velocity field from a plain function ``u(x, t)`` and the scheduler it belongs to."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], scheduler: Scheduler):
        self.function = function
        self.scheduler = scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


class CountingField:
    """Counts velocity evaluations (NFE) of the field it wraps.

    With guidance one evaluation is two forwards of the network; ``forwards`` counts those, given how many
    forwards one evaluation takes.
    """

    def __init__(self, field: VelocityField, forwards_per_evaluation: int = 1):
        self.field = field
        self.scheduler = field.scheduler
        self.forwards_per_evaluation = forwards_per_evaluation
        self.nfe = 0

    @property
    def forwards(self) -> int:
        return self.nfe * self.forwards_per_evaluation

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        return self.field(x, t)


class GuidedPrediction:
    """Classifier-free guidance f_null + s (f_cond - f_null) on a network's output (Ho & Salimans 2022).

    ``guidance_scale`` follows diffusers: 1 is unguided, and costs one forward instead of two. The
    class-conditional papers' w is ``guidance_scale - 1``. The velocity is affine in the prediction at a fixed x,
    so guiding the prediction guides the velocity alike.

    Args:
        predict: ``predict(x, t, condition)``, the network's output for a batch.
        condition: Conditioning of the batch, shape (B, ...).
        null_condition: The conditioning of a dropped label, same shape.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        condition: Tensor,
        null_condition: Tensor,
        guidance_scale: float,
    ):
        self.predict = predict
        self.guidance_scale = guidance_scale
        self.forwards_per_evaluation = 1 if guidance_scale == 1 else 2
        self.condition = condition if guidance_scale == 1 else torch.cat([condition, null_condition])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.predict(x, t, self.condition)
        # One doubled batch rather than two calls: the device is better filled.
        conditional, unconditional = self.predict(torch.cat([x, x]), t, self.condition).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
