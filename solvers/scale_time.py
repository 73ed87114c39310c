"""Scale-time (ST) transforms: changes of scheduler after training, and sigma0 preconditioning (BST section 2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ns import NSSolver
from solvers.schedulers.base import PathPoint, Scheduler, as_time


class ScaleTimePoint(NamedTuple):
    """The transform x-bar(r) = s x(t) at r: t, s, dt/dr and (ds/dr)/s, as float64 tensors with the shape of r."""

    t: Tensor
    s: Tensor
    d_t: Tensor
    d_log_s: Tensor


@dataclass(frozen=True, kw_only=True)
class Preconditioned(Scheduler):
    """A scheduler with its noise scaled: sigma-bar = sigma0 * sigma, alpha-bar = alpha (BNS eq. 14).

    ``sigma0`` is the papers' hyper-parameter, not the scheduler's own sigma(0).
    """

    base: Scheduler
    sigma0: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma0 > 0:
            raise ValueError(f"sigma0 must be positive, got {self.sigma0}")
        if isinstance(self.base, Preconditioned):
            raise ValueError("the scheduler is already preconditioned; multiply the two sigma0 instead")

    @property
    def name(self) -> str:
        return f"{self.base.name} with sigma0={self.sigma0:g}"

    @property
    def velocity_is_singular_at_end(self) -> bool:  # type: ignore[override]
        return self.base.velocity_is_singular_at_end

    def path(self, t: Tensor) -> PathPoint:
        point = self.base.path(t)
        return point._replace(sigma=self.sigma0 * point.sigma, d_sigma=self.sigma0 * point.d_sigma)

    def knots(self, first: float, last: float) -> Tensor:
        return self.base.knots(first, last)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        return self.base.time_at_angle(torch.atan2(self.sigma0 * torch.sin(angle), torch.cos(angle)))


def precondition(scheduler: Scheduler, sigma0: float) -> Scheduler:
    """``scheduler`` with its noise scaled by ``sigma0``; ``scheduler`` itself if sigma0 is 1.

    Raises:
        ValueError: ``sigma0`` is not positive.
    """
    if sigma0 == 1:
        return scheduler
    return Preconditioned(base=scheduler, sigma0=sigma0)


class SchedulerChange:
    """The ST transform that maps trajectories of ``source`` to trajectories of ``target`` (BNS eq. 8).

    t_r is the time of equal SNR, and s_r = hypot(alpha-bar, sigma-bar) / hypot(alpha, sigma), which equals the papers'
    sigma-bar/sigma but is finite at r = 1. ``target`` is cut to the times whose SNR ``source`` reaches: on a path
    that starts at snr > 0 (VP), a sigma0 above 1 starts at r_0 > 0, snr-bar(r_0) = snr(t_min). If ``target`` starts
    at the higher SNR (sigma0 below 1 on VP), sampling starts later on the source, from sigma(t) x0, which is an
    approximation. The source's start_scale, in units of its noise, is the target's too.
    """

    def __init__(self, source: Scheduler, target: Scheduler):
        first = float(target.time_at_angle(source.angle(source.t_min)))
        last = float(target.time_at_angle(source.angle(source.t_max)))
        # Rounding in the inverse must not move an end that the two schedulers have in common.
        t_min = max(target.t_min, 0.0 if abs(first) < 1e-12 else first)
        t_max = min(target.t_max, 1.0 if abs(1 - last) < 1e-12 else last)
        self.source = source
        target = dataclasses.replace(target, t_min=t_min, t_max=t_max, start_scale=None)
        if source.start_scale is not None:
            relative = source.start_scale / float(source.sigma(source.t_min))
            target = dataclasses.replace(target, start_scale=relative * float(target.sigma(t_min)))
        self.target = target

    def time_and_scale(self, r: float | Tensor) -> tuple[Tensor, Tensor]:
        """(t_r, s_r), float64, with the shape of ``r``, finite on the whole closed domain."""
        r = as_time(r)
        time = self.source.time_at_angle(self.target.angle(r))
        # Rounding may move the inverse beyond the ends, where the network must not be evaluated.
        time = time.clamp(self.source.t_min, self.source.t_max)
        outer, inner = self.target(r), self.source(time)
        scale = torch.hypot(outer.alpha, outer.sigma) / torch.hypot(inner.alpha, inner.sigma)
        return time, scale

    def __call__(self, r: float | Tensor) -> ScaleTimePoint:
        """The transform and its derivatives at ``r``; finite at both ends for cond_ot and cosine."""
        r = as_time(r)
        time, scale = self.time_and_scale(r)
        outer, inner = self.target(r), self.source(time)
        d_t = (outer.sigma * outer.d_alpha - outer.alpha * outer.d_sigma) / (
            scale**2 * (inner.sigma * inner.d_alpha - inner.alpha * inner.d_sigma)
        )
        d_log_s = (outer.alpha * outer.d_alpha + outer.sigma * outer.d_sigma) / (
            outer.alpha**2 + outer.sigma**2
        ) - d_t * (inner.alpha * inner.d_alpha + inner.sigma * inner.d_sigma) / (inner.alpha**2 + inner.sigma**2)
        return ScaleTimePoint(time, scale, d_t, d_log_s)


class TransformedField:
    """u-bar_r(x) = (s'/s) x + t' s u_{t_r}(x / s) (BNS eq. 7): ``field`` under another scheduler.

    It works on samples and, for :func:`solvers.to_ns.to_ns`, on coefficient vectors.
    """

    def __init__(self, field: VelocityField, scheduler: Scheduler):
        self.field = field
        self.change = SchedulerChange(field.scheduler, scheduler)
        self.scheduler = self.change.target

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scheduler.check_velocity_time(t)
        point = self.change(t)
        self.field.scheduler.check_velocity_time(point.t)
        scale, d_log_s, gain = (value.to(x.dtype) for value in (point.s, point.d_log_s, point.d_t * point.s))
        return d_log_s * x + gain * self.field(x / scale, point.t)

    def restore(self, x: Tensor) -> Tensor:
        """Map a sample of the transformed field, at its last time, back to the original path: x / s."""
        _, scale = self.change.time_and_scale(self.scheduler.t_max)
        return x / scale.to(x.dtype)


def on_source(solver: NSSolver, change: SchedulerChange) -> NSSolver:
    """Convert a solver of the transformed field to a solver of the original field, differentiably.

    With u-bar_j = d_j x-bar_j + g_j u_j (BNS eq. 7) the states of an NS solver satisfy

        x-bar_k = a_k x0 + sum_{j<k} b_kj (d_j x-bar_j + g_j u_j),

    a unit lower triangular system for their coefficients over (x0, u_0, ..., u_{n-1}); then x_k = x-bar_k / s_k.

    Args:
        solver: A solver for fields of ``change.target``; its sample is mapped back to the path of ``change.source``.
        change: The transform.

    Raises:
        ValueError: A time lies outside the domain of either scheduler, or the result is not finite.
    """
    change.target.check_velocity_time(solver.times)
    point = change(solver.times)
    change.source.check_velocity_time(point.t)
    _, last_scale = change.time_and_scale(change.target.t_max)
    n = solver.nfe
    feedback = torch.nn.functional.pad(solver.b * point.d_log_s, (0, 1))
    known = torch.cat([solver.a[:, None], solver.b * (point.d_t * point.s)], dim=1)
    identity = torch.eye(n + 1, dtype=torch.float64)
    states = torch.linalg.solve_triangular(identity - feedback, known, upper=False, unitriangular=True)
    rows = states / torch.cat([point.s, last_scale.reshape(1)])[:, None]
    if not bool(torch.isfinite(rows).all() and torch.isfinite(point.t).all()):
        raise ValueError(f"the solver has no finite non-stationary form on the {change.source.name} scheduler")
    return NSSolver(times=point.t, a=rows[:, 0], b=rows[:, 1:])
