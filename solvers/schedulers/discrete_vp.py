"""The variance-preserving path of networks trained at discrete timesteps, such as DDPM and Stable Diffusion."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.schedulers._betas import linear_betas, named_betas, scaled_linear_betas
from solvers.schedulers._monotone import invert_increasing, limited_slopes
from solvers.schedulers.base import TIME_TOLERANCE, PathPoint, Scheduler, as_time


@dataclass(frozen=True, kw_only=True)
class DiscreteVP(Scheduler):
    """alpha_t = sqrt(alphas_cumprod) at the N training timesteps, interpolated between them; sigma^2 = 1 - alpha^2.

    Timestep k of the network (0 next to the data, N - 1 the noisiest) is at t = 1 - (k + 1) / N. So t = 0 is the
    noisiest timestep, and t = 1, one step beyond the last trained one, is the data itself. The domain ends at timestep
    0, t = 1 - 1/N, with a remaining noise of sigma = sqrt(beta_0), so the velocity is finite on the whole domain. The
    path itself continues to alpha(1) = 1, because preconditioned copies of it are evaluated there.

    Between timesteps, 1 - alpha is a monotone cubic in the timestep (central differences as slopes, limited after
    Fritsch & Carlson 1980). So alpha and its derivative N d(1 - alpha)/dk are continuous, without kinks for adaptive
    integrators. Interpolating log alpha instead, as the DPM-Solver code does piecewise linearly, differs by less than
    2e-6 in alpha for the usual lists, but is undefined at alpha = 0. Here, lists with zero terminal SNR (Lin et al.
    2023) start at pure noise, as they should. sigma' = -alpha alpha' / sigma.

    Attributes:
        t_max: Last time; 1 means the last trained one, 1 - 1/N.
        betas: The N betas, from the data (k = 0) to the noise, as in a diffusers configuration; the last may be 1 (zero
            terminal SNR). Or their schedule by name: ``{schedule, start, end, count}``, with the schedule linear
            (default 1e-4 to 0.02), scaled_linear (Stable Diffusion's 0.00085 to 0.012), quadratic (1e-4 to 0.02) or
            cosine (no start and end), and 1000 timesteps. Default: DDPM's, linear.
        alphas_cumprod: The running products prod(1 - beta), instead of betas. A float32 table keeps only three digits
            of the noise near the data, so betas are the better source.

    Raises:
        ValueError: Both lists are set, a list is shorter than 2, values are outside (0, 1) or do not fall, or ``t_max``
            is between the last trained time and 1.
    """

    betas: tuple[float, ...] | Mapping[str, Any] | None = field(default=None, repr=False)
    alphas_cumprod: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.betas is not None and self.alphas_cumprod is not None:
            raise ValueError("the discrete_vp scheduler takes betas or alphas_cumprod, not both; leave one out")
        if self.alphas_cumprod is not None:
            object.__setattr__(self, "alphas_cumprod", _checked_alphas_cumprod(self.alphas_cumprod))
        else:
            betas = named_betas(self.betas) if isinstance(self.betas, Mapping) else self.betas
            object.__setattr__(self, "betas", _checked_betas(linear_betas() if betas is None else betas))
        self._end_by(1 - 1 / self.timesteps, "the last trained time, timestep 0")
        super().__post_init__()

    @property
    def name(self) -> str:
        return "discrete_vp"

    @property
    def timesteps(self) -> int:
        """N, the number of training timesteps."""
        return len(self.betas or self.alphas_cumprod or ())

    def timestep(self, t: float | Tensor) -> Tensor:
        """The network's timestep at time ``t``: real-valued, 0 to N - 1, float64, with the shape of ``t``.

        Raises:
            ValueError: ``t`` is outside the trained times [0, 1 - 1/N].
        """
        timestep = self.timesteps * (1 - as_time(t)) - 1
        return self._inside(timestep, self.timesteps * TIME_TOLERANCE, f"t={t}")

    def time_of(self, timestep: float | Tensor) -> Tensor:
        """The time of a (real-valued) timestep of the network, the inverse of :meth:`timestep`.

        Raises:
            ValueError: ``timestep`` is outside 0 to N - 1.
        """
        return 1 - (self._inside(as_time(timestep), 0.0, f"timestep {timestep}") + 1) / self.timesteps

    def _inside(self, timestep: Tensor, tolerance: float, asked: str) -> Tensor:
        last = self.timesteps - 1
        if not bool(((timestep >= -tolerance) & (timestep <= last + tolerance)).all()):
            raise ValueError(
                f"{asked} is outside the trained timesteps 0 to {last}, times 0 to {1 - 1 / self.timesteps:.6g}; "
                f"choose a time grid inside the scheduler's domain"
            )
        return timestep.clamp(0, last)

    def path(self, t: Tensor) -> PathPoint:
        position = self.timesteps * (1 - t)
        segment = position.detach().floor().clamp(0, self.timesteps - 1)
        missing, slope = self._cubic(segment.long(), position - segment)
        alpha = 1 - missing
        sigma = torch.sqrt(missing * (2 - missing))
        d_alpha = self.timesteps * slope
        return PathPoint(alpha=alpha, sigma=sigma, d_alpha=d_alpha, d_sigma=-alpha * d_alpha / sigma)

    def knots(self, first: float, last: float) -> Tensor:
        times = 1 - torch.arange(self.timesteps - 1, 0, -1, dtype=torch.float64) / self.timesteps
        return times[(times > first) & (times < last)]

    def time_at_angle(self, angle: Tensor) -> Tensor:
        """The time with snr(t) = tan(angle); t = 0 for more noise than the path has."""
        # 1 - sin(angle), computed without cancellation near the data.
        missing = torch.cos(angle) ** 2 / (1 + torch.sin(angle))
        knots, _ = self._knots
        segment = (torch.searchsorted(knots, missing.detach(), right=True) - 1).clamp(0, self.timesteps - 1)
        offset = invert_increasing(
            lambda offset: self._cubic(segment, offset),
            missing,
            0.0,
            1.0,
            guess=(missing - knots[segment]) / (knots[segment + 1] - knots[segment]),
        )
        return 1 - (segment + offset) / self.timesteps

    @cached_property
    def _knots(self) -> tuple[Tensor, Tensor]:
        """1 - alpha at positions k + 1 = 0 (the data) to N, (N + 1,), and the coefficients of the cubics, (N, 4)."""
        if self.alphas_cumprod is not None:
            products = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
            missing = (1 - products) / (1 + products.sqrt())
        else:
            missing = -torch.expm1(torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0) / 2)
        values = torch.cat([torch.zeros(1, dtype=torch.float64), missing])
        step, slopes = values.diff(), limited_slopes(values)
        left, right = slopes[:-1], slopes[1:]
        cubics = torch.stack([values[:-1], left, 3 * step - 2 * left - right, left + right - 2 * step], dim=1)
        return values, cubics

    def _cubic(self, segment: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """1 - alpha and its derivative in the position, at ``offset`` in [0, 1] within each ``segment``."""
        c0, c1, c2, c3 = self._knots[1][segment].unbind(-1)
        value = c0 + offset * (c1 + offset * (c2 + offset * c3))
        return value, c1 + offset * (2 * c2 + offset * 3 * c3)


def _numbers(values: Sequence[float], name: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) < 2:
        raise ValueError(f"{name} must list at least 2 training timesteps, got {len(numbers)}")
    return numbers


def _checked_betas(values: Sequence[float]) -> tuple[float, ...]:
    betas = _numbers(values, "betas")
    for k, beta in enumerate(betas):
        last = k == len(betas) - 1
        if not (0 < beta < 1 or (last and beta == 1)):
            raise ValueError(
                f"betas must lie strictly between 0 and 1 (the last may be 1: zero terminal SNR), "
                f"got {beta:g} at timestep {k}"
            )
    return betas


def _checked_alphas_cumprod(values: Sequence[float]) -> tuple[float, ...]:
    products = _numbers(values, "alphas_cumprod")
    for k, (previous, product) in enumerate(itertools.pairwise((1.0, *products))):
        if not 0 <= product < previous:
            raise ValueError(
                f"alphas_cumprod must fall strictly from below 1 to 0 or above, got {product:g} at timestep {k} after "
                f"{previous:g}; list it from the data (timestep 0) to the noise"
            )
    return products


__all__ = ["DiscreteVP", "linear_betas", "scaled_linear_betas"]

SCHEDULER = DiscreteVP
