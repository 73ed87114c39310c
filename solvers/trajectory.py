"""Dense ground-truth trajectories: the adaptive solver's own steps, and interpolation between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import TIME_TOLERANCE, as_time


@dataclass(frozen=True)
class DensePath:
    """Solutions x(t) of dx/dt = u_t(x) for a batch, by cubic Hermite interpolation between knots.

    The interpolant matches both the states and the velocities at the knots. It is exact for cubic polynomials, and its
    error is O(h^4) for a knot distance h (Hairer, Norsett & Wanner 1993, section II.6).

    Attributes:
        times: Knots of each sample, shape (B, K), float64, K >= 2, non-decreasing; a sample with fewer knots repeats
            its last one.
        states: x at the knots, shape (B, K, ...), floating point.
        velocities: u_t(x) at the knots, with the shape, dtype and device of ``states``; the device may differ from that
            of ``times``.

    Raises:
        ValueError: Shapes or dtypes do not match, or times are not finite or fall.
    """

    times: Tensor
    states: Tensor
    velocities: Tensor

    def __post_init__(self) -> None:
        times, states, velocities = self.times, self.states, self.velocities
        if times.ndim != 2 or times.shape[1] < 2 or times.dtype != torch.float64:
            raise ValueError(
                f"a path's times are (B, K) in float64 with at least 2 knots, got {tuple(times.shape)} in {times.dtype}"
            )
        if states.shape[:2] != times.shape or states.shape != velocities.shape or states.dtype != velocities.dtype:
            raise ValueError(
                f"a path of times {tuple(times.shape)} has states and velocities of one shape (B, K, ...) and dtype, "
                f"got {tuple(states.shape)} in {states.dtype} and {tuple(velocities.shape)} in {velocities.dtype}"
            )
        # The condition is written so that NaN fails it too.
        if not bool((times.diff(dim=1) >= 0).all() and torch.isfinite(times).all()):
            raise ValueError("a path's times must be finite and must not fall from knot to knot")

    def state(self, t: float | Tensor) -> Tensor:
        """x(t) of every sample, in the dtype of ``states``.

        Args:
            t: One time (0-d), or m of them, shape (m,), in any order.

        Returns:
            Shape (B, ...) for one time, (m, B, ...) for m. Differentiable in the states and in t.

        Raises:
            ValueError: ``t`` is neither a scalar nor a vector, or a time lies outside the knots of some sample.
        """
        times = as_time(t).to(self.times.device)
        if times.ndim > 1:
            raise ValueError(f"x(t) takes one time or a vector of times, got shape {tuple(times.shape)}")
        flat = self._inside(times.reshape(-1))
        # The interval ends at the first knot that is not before t, so the padding after the last knot is never used.
        after = torch.searchsorted(self.times, flat.detach().expand(len(self.times), -1).contiguous())
        after = after.clamp(1, self.times.shape[1] - 1)
        before = after - 1
        first, last = self.times.gather(1, before), self.times.gather(1, after)
        width = last - first
        share = (flat - first) / torch.where(width > 0, width, 1.0)
        rest = 1 - share
        states = (
            self._weighted(self.states, before, (1 + 2 * share) * rest**2)
            + self._weighted(self.states, after, share**2 * (3 - 2 * share))
            + self._weighted(self.velocities, before, width * share * rest**2)
            - self._weighted(self.velocities, after, width * share**2 * rest)
        )
        return states.transpose(0, 1) if times.ndim else states[:, 0]

    def _inside(self, t: Tensor) -> Tensor:
        """``t``, clamped to the domain common to all samples; raises a ValueError beyond rounding."""
        if not len(self.times):
            return t
        first, last = float(self.times[:, 0].max()), float(self.times[:, -1].min())
        outside = ~((t >= first - TIME_TOLERANCE) & (t <= last + TIME_TOLERANCE))
        if bool(outside.any()):
            raise ValueError(
                f"x(t) queried at t={float(t[outside][0]):.6g}, outside the path's times [{first:.6g}, {last:.6g}]; "
                f"make the trajectories on the whole domain of the scheduler"
            )
        return t.clamp(first, last)

    def _weighted(self, values: Tensor, knots: Tensor, weights: Tensor) -> Tensor:
        """weights * values at these knots of each sample: (B, m) and (B, K, ...) to (B, m, ...)."""
        rows = torch.arange(len(values), device=values.device)[:, None]
        picked = values[rows, knots.to(values.device)]
        return weights.to(values).reshape(*weights.shape, *(1,) * (picked.ndim - 2)) * picked
