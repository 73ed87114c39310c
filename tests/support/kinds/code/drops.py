"""A diffusion of short videos (B, 1, 4, 8, 8) that predicts the clean video, on the cosine path."""

from torch import nn


class VideoNet(nn.Module):
    """The clean video, given a noised one and its noise level's angle, from 0 (noise) to 1 (data)."""

    def __init__(self, width: int = 192):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.level = nn.Linear(1, width)
        self.outward = nn.Linear(width, 256)

    def forward(self, video, t):
        h = self.body(video) + self.level(t[:, None])
        return self.outward(nn.functional.silu(h)).view_as(video)
