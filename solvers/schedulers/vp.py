"""The variance-preserving path of diffusion models, in continuous time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import PathPoint, Scheduler


@dataclass(frozen=True, kw_only=True)
class VP(Scheduler):
    """alpha_t = xi_{1-t}, sigma_t = sqrt(1 - alpha_t^2), xi_s = exp(-s^2 (B-b)/4 - s b/2) (Song et al. 2020).

    alpha_0 is 0.0066, not 0, so the noise end keeps a trace of the data. The velocity is infinite at t = 1.

    Attributes:
        beta_max: B, the noise rate at t=0.
        beta_min: b, the noise rate at t=1.
    """

    beta_max: float = 20.0
    beta_min: float = 0.1
    velocity_is_singular_at_end = True

    @property
    def name(self) -> str:
        return "vp"

    def path(self, t: Tensor) -> PathPoint:
        s = 1 - t
        slope = (self.beta_max - self.beta_min) / 4
        log_alpha = -s * s * slope - s * self.beta_min / 2
        alpha = torch.exp(log_alpha)
        # Without expm1, 1 - alpha^2 would lose all digits near t = 1.
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha = alpha * (2 * s * slope + self.beta_min / 2)
        return PathPoint(alpha=alpha, sigma=sigma, d_alpha=d_alpha, d_sigma=-alpha * d_alpha / sigma)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        # Solve slope s^2 + (b/2) s = -log alpha for s, without cancellation at small s.
        slope = (self.beta_max - self.beta_min) / 4
        half_b = self.beta_min / 2
        neg_log_alpha = _neg_log_sin(angle)
        s = 2 * neg_log_alpha / (half_b + torch.sqrt(half_b**2 + 4 * slope * neg_log_alpha))
        return 1 - s


def _neg_log_sin(angle: Tensor) -> Tensor:
    """-log sin(angle), exact to rounding from pure noise to the data, where alpha = sin and sigma = cos of the angle.

    Near the data alpha is 1 to rounding, so the smaller of the two is taken. At 0 it is a large finite number, so that
    the time is far before the path and not undefined.
    """
    alpha, sigma = torch.sin(angle), torch.cos(angle)
    noisy = alpha < sigma
    # The branch that is not taken gets a harmless argument, so that its derivative is finite.
    from_alpha = -torch.log(torch.where(noisy, alpha, 1.0).clamp_min(torch.finfo(alpha.dtype).tiny))
    return torch.where(noisy, from_alpha, -0.5 * torch.log1p(-(torch.where(noisy, 0.0, sigma) ** 2)))


SCHEDULER = VP
