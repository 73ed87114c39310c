"""Draws the training pairs of an iteration: a pure function of (seed, iteration), so a resumed run draws the same."""

from __future__ import annotations

import torch


def batch_indices(pairs: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """Indices of the pairs of one iteration. Each epoch is a fresh permutation; an incomplete last batch is dropped.

    Args:
        pairs: Number of training pairs.
        batch_size: Pairs per iteration, at most ``pairs``: a larger value is reduced to that.
        seed: Seed of the shuffle.
        iteration: Index of the iteration, from 0.
    """
    size = min(batch_size, pairs)
    per_epoch = pairs // size
    epoch, position = divmod(iteration, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(pairs, generator=generator)
    return order[position * size : (position + 1) * size].tolist()
