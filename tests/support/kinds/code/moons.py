"""A score network for points in the plane: the gradient of the log density of noised data, at vp time s."""

import torch
from torch import nn


class ScoreNet(nn.Module):
    """Returns the score of x at time s, which runs from 0 (data) to 1 (noise), shape (B, 1)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, width: int = 128):
        super().__init__()
        self.beta_min, self.beta_max = beta_min, beta_max
        self.net = nn.Sequential(
            nn.Linear(5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def marginal_std(self, s):
        return (1 - (-0.5 * s**2 * (self.beta_max - self.beta_min) - s * self.beta_min).exp()).sqrt()

    def forward(self, x, s):
        return self.net(torch.cat([x, s, s.sqrt(), s.log()], dim=1)) / self.marginal_std(s)
