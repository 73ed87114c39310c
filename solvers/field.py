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

    Solvers ask with one time for the whole batch. Where several solvers share a batch, each sample brings the time of
    its own solver; a field that cannot answer that serves every solver alone, and no shared batch.
    """

    @property
    def scheduler(self) -> Scheduler: ...

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), each sample as if it were asked alone.

        Args:
            x: Shape (B, ...).
            t: 0-d float64, the time of every sample, or (B,) float64, one time a sample.

        Returns:
            The shape and dtype of ``x``.
        """
        ...


def check_time_shape(t: Tensor, x: Tensor) -> None:
    """Refuse times that are neither one for all samples nor one for each.

    Raises:
        ValueError: ``t`` is not 0-d, and not of shape (B,) for ``x`` of shape (B, ...).
    """
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(
            f"times of shape {tuple(t.shape)} for a batch of {len(x)} samples; give one time (0-d), or one time a "
            f"sample ({len(x)},)"
        )


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A function of time in the form that multiplies samples: what is 0-d stays so, (B,) becomes (B, 1, ..., 1).

    Args:
        value: 0-d or (B,), as the time it comes from.
        x: Samples, shape (B, ...); the result has their dtype and, where it has their length, their device.

    Raises:
        ValueError: ``value`` has another shape.
    """
    check_time_shape(value, x)
    if value.ndim == 0:
        return value.to(x.dtype)
    return value.to(device=x.device, dtype=x.dtype).view(-1, *(1,) * (x.ndim - 1))


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
        predict: ``predict(x, t, condition)``, the network's output for a batch; asked with times as it is asked.
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
        times = t if t.ndim == 0 else torch.cat([t, t])
        conditional, unconditional = self.predict(torch.cat([x, x]), times, self.condition).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
