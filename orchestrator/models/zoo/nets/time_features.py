"""Fourier features of time, as input of a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeFeatures(nn.Module):
    """Sines and cosines of t in [0, 1] at geometrically spaced frequencies.

    The highest frequency is deliberately low: it limits how fast the velocity can vary in time, and thus how many
    evaluations a solver needs.
    """

    frequencies: Tensor

    def __init__(self, features: int, max_frequency: float = 32.0):
        super().__init__()
        half = features // 2
        exponents = torch.arange(half) / max(half - 1, 1)
        self.register_buffer("frequencies", math.pi / 2 * max_frequency**exponents, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
