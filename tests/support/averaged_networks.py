"""A network as people train it, with buffers, and the wrappers in whose files its weights are found."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (1, 2, 3)


class Block(nn.Module):
    """A residual layer."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class Net(nn.Module):
    """A velocity with running statistics, frozen frequencies and, if asked for, a table that is not saved."""

    def __init__(self, width: int = 8, table: bool = False):
        super().__init__()
        size = math.prod(SHAPE)
        self.inward = nn.Linear(size + 1, width)
        self.frequencies = nn.Parameter(torch.randn(width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.outward = nn.Linear(width, size)
        if table:
            self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)
        self.has_table = table

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inward(torch.cat([x.flatten(1), t[:, None]], dim=1)) + torch.sin(self.frequencies)
        if self.has_table:
            h = h + self.table
        for block in self.blocks:
            h = block(h)
        return self.outward(h).view_as(x)


class Plain(nn.Module):
    """A velocity without buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat([x.flatten(1), t[:, None]], dim=1)))).view_as(x)


class Wrapped(nn.Module):
    """A network as a part of something larger, e.g. of a diffusion process with its schedule."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("betas", torch.linspace(1e-4, 0.02, 10))


class EMA(nn.Module):
    """The state of ema-pytorch: the network in training, its average, and two counters."""

    def __init__(self, model: nn.Module, average: nn.Module):
        super().__init__()
        self.online_model, self.ema_model = model, average
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("step", torch.tensor(7))


class ShadowEMA:
    """The state of score_sde's, torch_ema's and diffusers' averages: a list in the order of ``parameters()``."""

    def __init__(self, parameters: Any, trained_only: bool = False):
        kept = [p for p in parameters if p.requires_grad or not trained_only]
        self.shadow_params = [p.detach().clone() for p in kept]

    def state_dict(self) -> dict[str, Any]:
        """As these libraries write it."""
        return {"decay": 0.999, "num_updates": 3, "shadow_params": self.shadow_params}


class Settings:
    """A framework's settings, which only its own code can load."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the file was run")
