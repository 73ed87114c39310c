"""The U-Net of Dhariwal & Nichol ("Diffusion models beat GANs on image synthesis", 2021, section 3), scaled down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orchestrator.models.zoo.nets.labels import LabelConditioned
from orchestrator.models.zoo.nets.time_features import TimeFeatures

GROUPS = 8
"""Number of groups of each normalisation; it is small because there are few channels."""


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions with adaptive group normalisation.

    The normalised input of the second convolution is scaled and shifted by the embedding. ``resample`` halves or
    doubles the size in both branches.
    """

    def __init__(self, inward: int, outward: int, embedding: int, dropout: float, resample: nn.Module | None = None):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(GROUPS, inward), nn.SiLU())
        self.resample = resample if resample is not None else nn.Identity()
        self.widen = nn.Conv2d(inward, outward, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outward)
        self.norm = nn.GroupNorm(GROUPS, outward)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(outward, outward, 3, padding=1)
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward else nn.Identity()
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(_bias(self.last))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.widen(self.resample(self.first(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = nn.functional.silu(self.norm(hidden) * (1 + scale) + shift)
        return self.skip(self.resample(x)) + self.last(self.dropout(hidden))


class Attention(nn.Module):
    """Self-attention over all pixels, with heads of about ``head_channels`` channels."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.inward = nn.Conv2d(channels, 3 * channels, 1)
        self.outward = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(_bias(self.outward))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = self.inward(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        queries, keys, values = split.transpose(-1, -2).unbind(dim=1)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return x + self.outward(mixed.transpose(-1, -2).reshape(batch, channels, height, width))


class UNet(LabelConditioned, nn.Module):
    """A class-conditional U-Net for images.

    Args:
        shape: Shape of one sample, (C, H, W); H and W divisible by patch * 2 ** (levels - 1).
        classes: Number of labels; label ``classes`` itself means "dropped" (unconditional).
        channels: Channels of the first level.
        multipliers: Channels of each level, as multiples of ``channels``; each level halves the size.
        blocks: Residual blocks per level on the way down; the way up has one more.
        attention: Heights of the levels with self-attention after each block.
        head_channels: Channels of one attention head.
        dropout: Dropout inside the blocks during training.
        patch: Side of the squares of pixels that are folded into channels at the input and unfolded at the output, so
            that the first level has size / patch; 1 is the published architecture.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int] = (),
        head_channels: int = 32,
        dropout: float = 0.0,
        patch: int = 1,
    ):
        super().__init__()
        shrinks = patch * 2 ** (len(multipliers) - 1)
        if any(side % shrinks for side in shape[1:]) or channels % GROUPS:
            raise ValueError(
                f"a U-Net of {len(multipliers)} levels and patches of {patch} takes sides divisible by {shrinks} and "
                f"channels divisible by {GROUPS}, got shape {list(shape)} and {channels} channels"
            )
        heights = [shape[1] // patch // 2**level for level in range(len(multipliers))]
        if unknown := set(attention) - set(heights):
            raise ValueError(f"no level has height {min(unknown)}; choose the heights in attention from {heights}")
        embedding = 4 * channels
        self.time = nn.Sequential(TimeFeatures(channels), nn.Linear(channels, embedding), nn.SiLU())
        self.time_out = nn.Linear(embedding, embedding)
        self.label = nn.Embedding(classes + 1, embedding)
        self.patch, self.classes = patch, classes
        self.inward = nn.Conv2d(shape[0] * patch**2, channels, 3, padding=1)

        def level(inward: int, outward: int, height: int) -> nn.ModuleList:
            parts: list[nn.Module] = [ResBlock(inward, outward, embedding, dropout)]
            if height in attention:
                parts.append(Attention(outward, head_channels))
            return nn.ModuleList(parts)

        height, width = heights[0], channels
        skips = [width]
        self.down = nn.ModuleList()
        for depth, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(level(width, multiplier * channels, height))
                width = multiplier * channels
                skips.append(width)
            if depth < len(multipliers) - 1:
                self.down.append(nn.ModuleList([ResBlock(width, width, embedding, dropout, nn.AvgPool2d(2))]))
                skips.append(width)
                height //= 2
        self.middle = nn.ModuleList(
            [
                ResBlock(width, width, embedding, dropout),
                Attention(width, head_channels),
                ResBlock(width, width, embedding, dropout),
            ]
        )
        self.up = nn.ModuleList()
        for depth, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                parts = level(width + skips.pop(), multiplier * channels, height)
                width = multiplier * channels
                if depth and block == blocks:
                    parts.append(ResBlock(width, width, embedding, dropout, nn.Upsample(scale_factor=2)))
                    height *= 2
                self.up.append(parts)
        last = nn.Conv2d(width, shape[0] * patch**2, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(_bias(last))
        self.outward = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), last)
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU; faster on tensor cores too

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The network's output, in the shape of ``x``.

        Args:
            x: Shape (B, C, H, W), float32.
            t: Native time of each sample, shape (B,), float32.
            label: Shape (B,), int64, in [0, classes].
        """
        embedding = nn.functional.silu(self.time_out(self.time(t)) + self.label(label))
        folded = nn.functional.pixel_unshuffle(x, self.patch)
        hidden = self.inward(folded.contiguous(memory_format=torch.channels_last))
        skips = [hidden]
        for parts in self.down:
            hidden = _through(parts, hidden, embedding)
            skips.append(hidden)
        hidden = _through(self.middle, hidden, embedding)
        for parts in self.up:
            hidden = _through(parts, torch.cat([hidden, skips.pop()], dim=1), embedding)
        return nn.functional.pixel_shuffle(self.outward(hidden), self.patch)


def _through(parts: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    for part in parts.children():
        x = part(x, embedding)
    return x


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias
