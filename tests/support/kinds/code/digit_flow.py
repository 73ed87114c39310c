"""A class-conditional flow of digits (B, 1, 8, 8) at times from 0 (noise) to 1 (data); class 10 stands for "any"."""

import torch
from torch import nn


class DigitFlow(nn.Module):
    def __init__(self, width: int = 160):
        super().__init__()
        self.time = nn.Linear(2, width)
        self.label = nn.Embedding(11, width)
        self.inward = nn.Linear(64, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.outward = nn.Linear(width, 64)

    def forward(self, x, t, y):
        h = self.inward(x.flatten(1)) + self.time(torch.stack([t, torch.cos(3 * t)], dim=1)) + self.label(y)
        h = h + self.first(nn.functional.silu(h))
        h = h + self.second(nn.functional.silu(h))
        return self.outward(nn.functional.silu(h)).view_as(x)
