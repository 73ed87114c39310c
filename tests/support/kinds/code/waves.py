"""A diffusion of two-channel series with v-prediction, after a one-dimensional U-Net; time counts down from 1000."""

import math

import torch
from torch import nn


def embedding(time, width):
    frequencies = torch.exp(torch.arange(width // 2, device=time.device) * (-math.log(1000.0) / (width // 2)))
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.first = nn.Conv1d(channels, channels, 5, padding=2)
        self.second = nn.Conv1d(channels, channels, 5, padding=2)
        self.time = nn.Linear(width, channels)

    def forward(self, h, time):
        inner = self.first(torch.nn.functional.silu(h)) + self.time(time)[:, :, None]
        return h + self.second(torch.nn.functional.silu(inner))


class SeriesUNet(nn.Module):
    """v of a series (B, C, T) at a time (B,), 1000 for noise and 0 for data."""

    def __init__(self, channels: int = 2, hidden: int = 24, width: int = 32):
        super().__init__()
        self.width = width
        self.inward, self.outward = nn.Conv1d(channels, hidden, 3, padding=1), nn.Conv1d(hidden, channels, 3, padding=1)
        self.fine, self.coarse, self.last = (Block(hidden, width) for _ in range(3))

    def forward(self, sample, time):
        time = embedding(time, self.width)
        h = self.fine(self.inward(sample), time)
        low = self.coarse(nn.functional.avg_pool1d(h, 4), time)
        return self.outward(self.last(h + nn.functional.interpolate(low, scale_factor=4), time))
