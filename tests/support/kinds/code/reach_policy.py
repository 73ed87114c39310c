"""A diffusion policy: the next 16 positions of an arm in the plane, given where it is and where it should go."""

import math

import torch
from torch import nn


class PolicyNet(nn.Module):
    """Noise in a trajectory (B, 16, 2) at a timestep (B,), given an observation (B, 4)."""

    def __init__(self, horizon: int = 16, action_dim: int = 2, obs_dim: int = 4, width: int = 128):
        super().__init__()
        self.frequencies = 8
        self.obs_encoder = nn.Sequential(nn.Linear(obs_dim, width), nn.SiLU())
        self.time_encoder = nn.Linear(2 * self.frequencies, width)
        self.inward = nn.Linear(horizon * action_dim, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.outward = nn.Linear(width, horizon * action_dim)

    def forward(self, sample, timestep, global_cond):
        angles = timestep[:, None] * torch.exp(
            torch.arange(self.frequencies, device=sample.device) * (-math.log(100.0) / self.frequencies)
        )
        cond = self.time_encoder(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.obs_encoder(global_cond)
        h = self.inward(sample.flatten(1)) + cond
        h = h + self.first(nn.functional.silu(h))
        h = h + self.second(nn.functional.silu(h + cond))
        return sample + self.outward(nn.functional.silu(h)).view_as(sample)
