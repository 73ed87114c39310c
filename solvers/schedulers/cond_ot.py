"""The conditional optimal-transport path of flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import PathPoint, Scheduler


@dataclass(frozen=True, kw_only=True)
class CondOT(Scheduler):
    """alpha = t, sigma = 1 - t (FM-OT: Lipman et al. 2022; BNS appendix E)."""

    @property
    def name(self) -> str:
        return "cond_ot"

    def path(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(alpha=t, sigma=1 - t, d_alpha=one, d_sigma=-one)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        return alpha / (alpha + sigma)


SCHEDULER = CondOT
