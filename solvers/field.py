"""Velocity fields, the input of every solver, and wrappers for guidance and evaluation counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.schedulers.base import Scheduler


class VelocityField(Protocol):
    """The right-hand side u_t(x) of the sampling ODE dx/dt = u_t(x), with t=0 noise and t=1 data.

    ``scheduler`` is the Gaussian path that u belongs to. Sampling starts at its ``t_min``, from
    ``scheduler.start(t_min) * x0`` with x0 ~ N(0, I).

    A solver passes one time for the whole batch. If several solvers share a batch, each sample has the time of its own
    solver. A field that does not accept one time per sample still works with one solver at a time.
    """

    @property
    def scheduler(self) -> Scheduler: ...

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x); the result for a sample must not depend on the other samples.

        Args:
            x: Shape (B, ...).
            t: 0-d float64, the time of all samples, or (B,) float64, one time per sample.

        Returns:
            The velocity, with the shape and dtype of ``x``.
        """
        ...


def check_time_shape(t: Tensor, x: Tensor) -> None:
    """Check that ``t`` is one time for all samples or one time per sample.

    Raises:
        ValueError: ``t`` is neither 0-d nor of shape (B,) for ``x`` of shape (B, ...).
    """
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(
            f"times of shape {tuple(t.shape)} for a batch of {len(x)} samples; give one time (0-d), or one time per "
            f"sample ({len(x)},)"
        )


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshape a function of time so that it multiplies samples: 0-d stays 0-d, (B,) becomes (B, 1, ..., 1).

    Args:
        value: 0-d or (B,), like the time it was computed from.
        x: Samples, shape (B, ...). The result has their dtype and, if ``value`` has shape (B,), their device.

    Raises:
        ValueError: ``value`` has a different shape.
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
    """Counts the velocity evaluations (NFE) of the field it wraps.

    With guidance, one evaluation takes two forward passes of the network. ``forwards`` is the number of forward
    passes, ``forwards_per_evaluation`` for each evaluation.
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

    ``guidance_scale`` follows diffusers: 1 is unguided, and costs one forward pass instead of two. The
    class-conditional papers' w is ``guidance_scale - 1``. The velocity is affine in the prediction at a fixed x, so
    guiding the prediction guides the velocity in the same way.

    Args:
        predict: ``predict(x, t, condition)`` returns the network's output for a batch; ``t`` is 0-d or one time per
            sample, like the time of the call. ``condition`` is a copy, so it may be changed in place.
        condition: Conditioning of the batch: a tensor of shape (B, ...), or an object with ``clone()`` and, for
            guidance, ``joined(other)``, such as several tensors by name.
        null_condition: The dropped conditioning, of the same kind and shape.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Any], Tensor],
        condition: Any,
        null_condition: Any,
        guidance_scale: float,
    ):
        self.predict = predict
        self.guidance_scale = guidance_scale
        self.forwards_per_evaluation = 1 if guidance_scale == 1 else 2
        if guidance_scale == 1:
            self.condition = condition
        elif isinstance(condition, Tensor):
            self.condition = torch.cat([condition, null_condition])
        else:
            self.condition = condition.joined(null_condition)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.predict(x, t, self.condition.clone())
        # One doubled batch uses the device better than two calls.
        times = t if t.ndim == 0 else torch.cat([t, t])
        conditional, unconditional = self.predict(torch.cat([x, x]), times, self.condition.clone()).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
