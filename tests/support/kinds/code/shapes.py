"""A rectified flow of point clouds (B, N, 3): it predicts noise minus data, at times from 0 (data) to 1 (noise)."""

import torch
from torch import nn


class PointFlow(nn.Module):
    """Each point sees itself, and the mean and maximum of all; ``t`` has shape (B, 1)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3 + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.merge = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, points, t):
        time = torch.cat([t, torch.cos(3 * t)], dim=1)[:, None].expand(-1, points.shape[1], -1)
        h = self.point(torch.cat([points, time], dim=2))
        pooled = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], dim=2).expand(-1, points.shape[1], -1)
        return self.merge(torch.cat([h, pooled], dim=2))
