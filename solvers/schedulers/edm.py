"""The variance-exploding path in EDM's parametrisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import PathPoint, Scheduler


@dataclass(frozen=True, kw_only=True)
class EDM(Scheduler):
    """alpha = 1, sigma = sigma_max (1 - t): noise falls linearly from sigma_max (Karras et al. 2022; BNS appendix E).

    Sampling starts from ``sigma(t_min) * x0``, which is sigma_max * x0 on the full domain. snr(0) is 1 / sigma_max, not
    0. The domain ends at noise sigma_min, the lowest level that a network was trained on. With sigma_min = 0 the path
    continues down to the data itself, for networks that can be evaluated there.

    Attributes:
        t_max: Last time; 1 means the time at which sigma is ``sigma_min``, 1 - sigma_min / sigma_max.
        sigma_min: Noise level at the data end, in units of the data.
        sigma_max: Noise level at t = 0, in units of the data.

    Raises:
        ValueError: 0 <= sigma_min < sigma_max does not hold, or ``t_max`` is between the time of sigma_min and 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(
                f"the edm scheduler needs 0 <= sigma_min < sigma_max, got sigma_min={self.sigma_min}, "
                f"sigma_max={self.sigma_max}"
            )
        self._end_by(1 - self.sigma_min / self.sigma_max, f"the time of sigma_min={self.sigma_min:g}")
        super().__post_init__()

    @property
    def name(self) -> str:
        return "edm"

    def path(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(
            alpha=one, sigma=self.sigma_max * (1 - t), d_alpha=torch.zeros_like(t), d_sigma=-self.sigma_max * one
        )

    def time_at_angle(self, angle: Tensor) -> Tensor:
        # Noise above sigma_max corresponds to t < 0, and pure noise (angle 0) to t = -inf.
        return 1 - torch.cos(angle) / (self.sigma_max * torch.sin(angle))


SCHEDULER = EDM
