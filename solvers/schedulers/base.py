"""Base class of the schedulers of Gaussian paths; independent of networks and solvers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TIME_TOLERANCE = 1e-9
"""Tolerance for rounding when a time is compared with the ends of a scheduler's domain."""


def as_time(t: float | Tensor) -> Tensor:
    """``t`` as a float64 tensor; schedules are scalar functions, so double precision costs nothing."""
    return torch.as_tensor(t, dtype=torch.float64)


class PathPoint(NamedTuple):
    """The scheduler at ``t``: alpha, sigma and their time derivatives, float64 tensors with the shape of ``t``."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True, kw_only=True)
class Scheduler(ABC):
    """A Gaussian path p_t(x | x1) = N(alpha_t x1, sigma_t^2 I) (BNS eq. 3), with t=0 noise and t=1 data.

    The signal-to-noise ratio alpha/sigma rises strictly with t. It is represented by the *angle*
    atan2(alpha, sigma) in [0, pi/2], which is finite at both ends, unlike log-SNR.

    Attributes:
        t_min: First time of the domain; a sampler starts there from :meth:`start` x0, x0 ~ N(0, I).
        t_max: Last time of the domain.
        start_scale: The weight of x0 in that first state; by default sigma(t_min), the noise of the path. 1 for models
            whose authors start from the noise itself, though a trace of data is left at t_min.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    start_scale: float | None = None

    #: Whether the velocity is infinite at t = 1, as on variance-preserving paths; a domain that ends earlier avoids it.
    velocity_is_singular_at_end = False

    @property
    def functions(self) -> tuple[Callable[..., Tensor], ...]:
        """Functions of the user that define the path; their code is part of a model's digest."""
        return ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_min < self.t_max <= 1.0:
            raise ValueError(
                f"a scheduler's domain must satisfy 0 <= t_min < t_max <= 1, got t_min={self.t_min}, t_max={self.t_max}"
            )
        if self.start_scale is not None and not 0 < self.start_scale < math.inf:
            raise ValueError(f"start_scale must be a positive number, got {self.start_scale}")

    def _end_by(self, last: float, meaning: str) -> None:
        """End the domain at ``last``, for paths that end before t = 1: t_max = 1 becomes ``last``.

        Raises:
            ValueError: ``t_max`` lies between ``last`` and 1.
        """
        if self.t_max == 1.0:
            object.__setattr__(self, "t_max", last)
        elif last < self.t_max <= 1.0:
            raise ValueError(
                f"t_max={self.t_max:.6g} lies beyond {meaning}, {last:.6g}, where the {self.name} scheduler ends; "
                f"leave t_max out or make it smaller"
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of this scheduler in configurations and theta artifacts."""

    @abstractmethod
    def path(self, t: Tensor) -> PathPoint:
        """alpha, sigma and their time derivatives at float64 ``t``, without checking the domain."""

    @abstractmethod
    def time_at_angle(self, angle: Tensor) -> Tensor:
        """The inverse of :meth:`angle`: the time with snr(t) = tan(angle)."""

    def knots(self, first: float, last: float) -> Tensor:
        """Rising times strictly between ``first`` and ``last`` where the path is not smooth, shape (k,), float64."""
        return torch.zeros(0, dtype=torch.float64)

    def __call__(self, t: float | Tensor) -> PathPoint:
        return self.path(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        return self(t).sigma

    def start(self, t: float | Tensor) -> Tensor:
        """Weight of x0 in the first state of a solver that begins at ``t``, float64: sigma(t) without a start_scale.

        A start_scale is kept relative to the noise of the path, so that it means the same under every scheduler.
        """
        if self.start_scale is None:
            return self.sigma(t)
        first = self.sigma(self.t_min)
        t = as_time(t)
        # Exactly the scale at t_min, where the quotient may be rounded.
        return torch.where(t == self.t_min, self.start_scale, self.start_scale * (self.sigma(t) / first))

    def angle(self, t: float | Tensor) -> Tensor:
        """atan2(alpha_t, sigma_t): 0 for pure noise, pi/2 for clean data."""
        point = self(t)
        return torch.atan2(point.alpha, point.sigma)

    def lambda_(self, t: float | Tensor) -> Tensor:
        """Log-SNR log(alpha_t / sigma_t): -inf for pure noise, +inf for clean data."""
        point = self(t)
        return torch.log(point.alpha) - torch.log(point.sigma)

    def time_at_lambda(self, lambda_: float | Tensor) -> Tensor:
        """The time with the given log-SNR."""
        return self.time_at_angle(torch.atan(torch.exp(as_time(lambda_))))

    def check_velocity_time(self, t: float | Tensor) -> None:
        """Check that the velocity exists at ``t``.

        Args:
            t: One or more times, of any shape.

        Raises:
            ValueError: A time lies outside [t_min, t_max], or is 1 and the velocity is infinite there.
        """
        times = as_time(t).detach()
        if times.ndim:
            # The domain is an interval, so all times lie inside if both extremes do. With a NaN, both extremes are NaN.
            for extreme in times.aminmax():
                self.check_velocity_time(extreme)
            return
        time = float(times)
        if not math.isfinite(time) or not self.t_min - TIME_TOLERANCE <= time <= self.t_max + TIME_TOLERANCE:
            raise ValueError(
                f"velocity queried at t={time:.6g}, outside the domain [{self.t_min:.6g}, {self.t_max:.6g}] of "
                f"the {self.name} scheduler; choose a time grid inside it"
            )
        if self.velocity_is_singular_at_end and time >= 1 - TIME_TOLERANCE:
            raise ValueError(
                f"the velocity of the {self.name} scheduler is infinite at t={time:.6g}; use a solver that does not "
                f"evaluate there (Euler, Midpoint, multistep), or change the field to the cond_ot scheduler, "
                f"where it is finite"
            )
