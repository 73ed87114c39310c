"""A transformer on the pixels of digits, with EDM's preconditioning: the denoised image at a noise level sigma."""

import torch
from torch import nn


class Transformer(nn.Module):
    """F(x, c) on 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 48, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.noise = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.pixels = nn.ConvTranspose2d(width, 1, 2, stride=2)

    def forward(self, x, c):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions + self.noise(c[:, None])[:, None]
        return self.pixels(self.layer(tokens).transpose(1, 2).unflatten(2, (4, 4)))


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022, table 1."""

    def __init__(self, sigma_data: float = 0.5):
        super().__init__()
        self.sigma_data = sigma_data
        self.model = Transformer()

    def forward(self, x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        total = (s**2 + self.sigma_data**2).sqrt()
        inner = self.model(x / total, sigma.log() / 4)
        return self.sigma_data**2 / total**2 * x + s * self.sigma_data / total * inner
