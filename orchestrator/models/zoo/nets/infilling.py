"""A network that fills in masked mel frames of speech, given frame-aligned tokens and a prompt.

It takes the conditioning of BNS section 5.4 and D.5 (after Voicebox) and is small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orchestrator.models.zoo.nets.time_features import TimeFeatures


class ConvBlock(nn.Module):
    """A depthwise convolution over time, then a two-layer perceptron whose normalised input is scaled and shifted."""

    def __init__(self, width: int, kernel: int, embedding: int):
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(embedding, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, None].chunk(2, dim=2)
        hidden = self.norm(self.mix(x.transpose(1, 2)).transpose(1, 2)) * (1 + scale) + shift
        return x + self.down(nn.functional.silu(self.up(hidden)))


class AttentionBlock(nn.Module):
    """Self-attention over all frames, which carries the voice of the prompt to the masked part."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, frames, width = x.shape
        split = self.inward(self.norm(x)).view(batch, frames, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(dim=0)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return x + self.outward(mixed.transpose(1, 2).reshape(batch, frames, width))


class Infilling(nn.Module):
    """Convolution blocks over time with an attention block after every ``convolutions`` of them.

    Args:
        shape: Shape of one sample, (features, frames); ``frames`` divisible by ``patch``.
        tokens: Number of possible tokens per frame; the last one means "unknown".
        width: Width of the residual stream.
        depth: Number of groups of convolution blocks, each followed by an attention block.
        convolutions: Number of convolution blocks per group.
        kernel: Kernel size of a depthwise convolution, in patches, odd.
        heads: Number of heads of an attention block.
        patch: Number of frames that form one step of the sequence.
        token_width: Width of a token's embedding.

    Attributes:
        conditioning: Name of the dataset plugin that draws such conditioning.
    """

    conditioning = "spoken_digits"

    def __init__(
        self,
        shape: Sequence[int],
        tokens: int,
        width: int,
        depth: int,
        convolutions: int = 3,
        kernel: int = 7,
        heads: int = 4,
        patch: int = 2,
        token_width: int = 16,
    ):
        super().__init__()
        features, frames = shape
        if frames % patch or kernel % 2 == 0 or width % heads:
            raise ValueError(
                f"frames must be divisible by patch, width by heads, and kernel odd; got frames {frames}, patch "
                f"{patch}, width {width}, heads {heads}, kernel {kernel}"
            )
        self.features, self.frames, self.patch, self.tokens = features, frames, patch, tokens
        self.time = nn.Sequential(TimeFeatures(64), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.token = nn.Embedding(tokens, token_width)
        self.inward = nn.Linear(patch * (2 * features + 1 + token_width), width)
        self.position = nn.Parameter(0.02 * torch.randn(frames // patch, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.extend(ConvBlock(width, kernel, width) for _ in range(convolutions))
            self.blocks.append(AttentionBlock(width, heads))
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, patch * features)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's output, in the shape of ``x``.

        Args:
            x: Shape (B, features, frames), float32.
            t: Native time of each sample, shape (B,), float32.
            condition: Shape (B, features + 2, frames), float32: the prompt (0 in masked frames), the mask (1 in masked
                frames) and the token of each frame.
        """
        batch = len(x)
        tokens = self.token(condition[:, -1].long())
        known = condition[:, :-1].transpose(1, 2)
        steps = torch.cat([x.transpose(1, 2), known, tokens], dim=2).reshape(batch, self.frames // self.patch, -1)
        hidden = self.inward(steps) + self.position
        embedding = self.time(t)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.outward(self.norm(hidden)).reshape(batch, self.frames, self.features).transpose(1, 2)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The dropped conditioning: every frame masked and every token unknown."""
        null = torch.zeros_like(condition)
        null[:, -2] = 1
        null[:, -1] = self.tokens - 1
        return null

    def condition_error(self, condition: Tensor) -> str | None:
        """Describe the problem with invalid conditioning; None if it is valid."""
        expected = (self.features + 2, self.frames)
        if tuple(condition.shape[1:]) != expected:
            return f"conditioning has shape {tuple(condition.shape[1:])}, but the model takes {expected}"
        if not bool(((condition[:, -1] >= 0) & (condition[:, -1] < self.tokens)).all()):
            return f"conditioning has a token outside 0..{self.tokens - 1}"
        return None
