"""Imputation of a time series in the style of CSDI: noise of the missing entries, given the others and a mask."""

import torch
from torch import nn


class Imputer(nn.Module):
    """Noise in a series (B, T, D) at timestep (B,); ``mask`` is 1 where ``values`` are known."""

    def __init__(self, length: int = 24, features: int = 2, steps: int = 50, width: int = 160):
        super().__init__()
        self.diffusion_step = nn.Embedding(steps, width)
        self.inward = nn.Linear(3 * length * features, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.outward = nn.Linear(width, length * features)

    def forward(self, noisy, diffusion_step, cond):
        values, mask = cond["values"], cond["mask"].to(noisy)
        seen = torch.cat([noisy * (1 - mask), values * mask, mask], dim=1).flatten(1)
        h = self.inward(seen) + self.diffusion_step(diffusion_step)
        return noisy + self.outward(h + self.body(h)).view_as(noisy)
