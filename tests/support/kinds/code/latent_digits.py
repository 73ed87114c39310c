"""A latent flow: digits of 8 x 8 pixels through a small autoencoder, and a flow in its latents (4, 2, 2)."""

from torch import nn


class Autoencoder(nn.Module):
    """Images (B, 1, 8, 8) in [0, 1] to latents (B, 4, 2, 2), and back."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.down = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 16))
        self.up = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 64), nn.Sigmoid())

    def encode(self, images):
        return self.down(images).view(-1, 4, 2, 2)

    def decode(self, z):
        return self.up(z).view(-1, 1, 8, 8)


class LatentFlow(nn.Module):
    """Velocity of latents at a time from 0 (noise) to 1 (data)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.inward = nn.Linear(16, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 16))

    def forward(self, z, t):
        return self.body(self.inward(z.flatten(1)) + self.time(t[:, None])).view_as(z)
