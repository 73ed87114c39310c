"""Residual perceptron for images of a few dozen pixels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from orchestrator.models.zoo.nets.labels import LabelConditioned
from orchestrator.models.zoo.nets.time_features import TimeFeatures


class FilmBlock(nn.Module):
    """Residual two-layer perceptron whose normalised input is scaled and shifted by the conditioning."""

    def __init__(self, width: int, condition_width: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(condition_width, 2 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).chunk(2, dim=1)
        hidden = self.norm(x) * (1 + scale) + shift
        return x + self.down(self.dropout(nn.functional.silu(self.up(hidden))))


class FilmMLP(LabelConditioned, nn.Module):
    """Residual perceptron over flattened images, conditioned on time and class label.

    Args:
        shape: Shape of one sample, e.g. (1, 8, 8).
        classes: Number of labels; label ``classes`` itself means "dropped" (unconditional).
        width: Width of the residual stream.
        depth: Number of residual blocks.
        condition_width: Width of the time and label embedding.
        dropout: Dropout inside the blocks during training.
        gated_skip: Add a skip path from input to output; learned functions of time gate it and the network. Noise
            prediction needs it: when the input is almost pure noise, a network cannot reproduce it exactly enough.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: int,
        depth: int,
        condition_width: int,
        dropout: float = 0.0,
        gated_skip: bool = False,
    ):
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        dimensions = math.prod(shape)
        self.time = nn.Sequential(TimeFeatures(32), nn.Linear(32, condition_width), nn.SiLU())
        self.time_out = nn.Linear(condition_width, condition_width)
        self.label = nn.Embedding(classes + 1, condition_width)
        self.inward = nn.Linear(dimensions, width)
        self.blocks = nn.ModuleList(FilmBlock(width, condition_width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, dimensions)
        self.gates = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2)) if gated_skip else None

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The network's output, in the shape of ``x``.

        Args:
            x: Shape (B, \\*shape), float32.
            t: Native time of each sample, shape (B,), float32.
            label: Shape (B,), int64, in [0, classes].
        """
        time = self.time_out(self.time(t))
        condition = nn.functional.silu(time + self.label(label))
        hidden = self.inward(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        output = self.outward(self.norm(hidden)).view_as(x)
        if self.gates is None:
            return output
        skip, gain = (gate.view(-1, *(1,) * (x.ndim - 1)) for gate in self.gates(time).unbind(dim=1))
        return skip * x + gain * output
