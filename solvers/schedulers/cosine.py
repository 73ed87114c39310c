"""The cosine path of flow matching and v-prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import PathPoint, Scheduler

HALF_PI = math.pi / 2


@dataclass(frozen=True, kw_only=True)
class Cosine(Scheduler):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2) (FM/v-CS: Salimans & Ho 2022; BNS appendix E)."""

    @property
    def name(self) -> str:
        return "cosine"

    def path(self, t: Tensor) -> PathPoint:
        # cos(pi t / 2) is computed as the sine of the complement, which is exactly 0 at t = 1.
        alpha, sigma = torch.sin(HALF_PI * t), torch.sin(HALF_PI * (1 - t))
        return PathPoint(alpha=alpha, sigma=sigma, d_alpha=HALF_PI * sigma, d_sigma=-HALF_PI * alpha)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        return angle / HALF_PI


SCHEDULER = Cosine
