"""Tiny networks in the style of third-party code; none of them imports this project.

Their weights are random and large enough that state, time and label all matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (1, 2, 3)
CLASSES = 3
DROPPED = 3


class Core(nn.Module):
    """A smooth function of a state, a number in [0, 1] and a label vector."""

    def __init__(self, size: int = math.prod(SHAPE), labels: int = CLASSES + 1, width: int = 16, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        self.inward = weights(size, width, scale=size**-0.5)
        self.time = weights(2, width)
        self.label = weights(labels, width)
        self.outward = weights(width, size, scale=0.7 * width**-0.5)

    def forward(self, x: Tensor, s: Tensor, label: Tensor) -> Tensor:
        time = torch.stack([torch.sin(2 * s), torch.cos(2 * s)], dim=1)
        hidden = x.flatten(1) @ self.inward + time @ self.time + label
        return (torch.tanh(hidden) @ self.outward).view_as(x)


class Flow(nn.Module):
    """A flow-matching velocity; t runs from 0 (noise) to 1 (data)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.core = Core(seed=seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.core(x, t, self.core.label[y]) - 0.3 * x


class Gaussian(nn.Module):
    """The velocity from N(0, I) to N(2, I / 4) in closed form, for samples of any shape; it has no weights."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.ndim - 1))
        variance = (1 - t) ** 2 + t**2 / 4
        return 2 + (t / 4 - (1 - t)) / variance * (x - 2 * t)


class ReversedFlow(nn.Module):
    """The same velocity with timesteps that run from 1000 (noise) to 0 (data)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.flow = Flow(seed)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.flow(sample, 1 - timestep / 1000, class_labels)


class Noise(nn.Module):
    """A noise prediction at timesteps 0 to ``count`` - 1."""

    def __init__(self, count: int = 400, seed: int = 0):
        super().__init__()
        self.count = count
        self.core = Core(seed=seed)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        s = timestep / self.count
        return (0.3 + 0.6 * s).view(-1, 1, 1, 1) * x + 0.5 * self.core(x, s, self.core.label[y])


class NoiseTable(nn.Module):
    """A noise prediction from a look-up table of timesteps: whole numbers only, as int64.

    Between two rows, which are far apart, the prediction of ``count`` timesteps changes by whole units.
    """

    def __init__(self, count: int = 20, seed: int = 0):
        super().__init__()
        self.core = Core(seed=seed)
        self.rows = nn.Embedding(count, 2)
        with torch.no_grad():
            angle = 2 * math.pi * torch.arange(count) / count
            self.rows.weight.copy_(torch.stack([angle.sin(), angle.cos()], dim=1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.rows(timestep)[:, 0]
        return 0.6 * x + 0.5 * self.core(x, time, self.core.label[0])


class Fractional(nn.Module):
    """A smooth function of a state and a time up to 20, of any dtype; it stands for any prediction."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.core = Core(seed=seed)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + 0.3 * self.core(x, t / 20, self.core.label[0])


class Truncating(NoiseTable):
    """The same, for times of any dtype, of which it drops the fraction."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep.long())


class Denoiser(nn.Module):
    """EDM's interface and preconditioning around the core."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, sigma_data: float = 0.5):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = 0.0, float("inf"), sigma_data
        self.core = Core(img_channels * img_resolution**2, max(label_dim, 1))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **model_kwargs: Any) -> Tensor:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        label = torch.zeros(1, self.label_dim) if class_labels is None else class_labels
        vector = label @ self.core.label if self.label_dim else torch.zeros(())
        answer = self.core(x / total, sigma.flatten().log() / 4, vector)
        return self.sigma_data**2 / total**2 * x + sigma * self.sigma_data / total * answer

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)


class TableDenoiser(Denoiser):
    """A denoiser that rounds noise levels to a table, as networks trained at discrete timesteps do."""

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma).log2().round().exp2()


class Echo(nn.Module):
    """Returns the time, or the labels if there are any; ``what`` selects an invalid output instead."""

    def __init__(self, what: str = "time"):
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
        answer = (t if y is None else y.to(x.dtype)).view(-1, *(1,) * (x.ndim - 1)).expand_as(x)
        return {"time": answer, "twice": torch.cat([answer, answer], dim=1), "tuple": (answer,)}[self.what]


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1)))).view_as(x)


class Unset(nn.Module):
    """Random weights without a seed of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).view_as(x)


class Computing(Unset):
    """Its constructor reads the values of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = float(self.layer.weight.detach().abs().max())


def not_a_module() -> int:
    """A factory that does not return a module."""
    return 3


class Spread(nn.Module):
    """Stands for a network spread over several devices: its second half does not follow the requested device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

    def to(self, device: Any) -> Spread:  # type: ignore[override]
        """Move the first half to the device, and the second to float64, which stands for another device."""
        self.first.to(device)
        self.second.double()
        return self

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.first(x.unsqueeze(-1))
        return self.second(half.double()).to(x).squeeze(-1)
