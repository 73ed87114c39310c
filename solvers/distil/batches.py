"""Draws the training pairs of an iteration: a pure function of (seed, iteration), so a resumed run draws the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchSizes:
    """Pairs per iteration: ``first * growth^k`` in iteration k, rounded, at most ``largest``."""

    first: int
    largest: int
    growth: float = 1.0

    def size(self, iteration: int) -> int:
        """Pairs of an iteration, from 0."""
        if self.first >= self.largest or self.growth == 1:
            return min(self.first, self.largest)
        return min(round(self.first * self.growth**iteration), self.largest)


def batch_indices(pairs: int, sizes: BatchSizes | int, seed: int, iteration: int) -> list[int]:
    """Indices of the pairs of one iteration. Each epoch is a fresh permutation; what is left of one is dropped if it is
    too short for the next batch.

    Args:
        pairs: Number of training pairs.
        sizes: Pairs per iteration, or a number for all; reduced to ``pairs`` where it is more.
        seed: Seed of the shuffle.
        iteration: Index of the iteration, from 0.
    """
    if isinstance(sizes, int):
        size = min(sizes, pairs)
        epoch, position = divmod(iteration, pairs // size)
        first = position * size
    else:
        epoch, after = 0, 0
        for k in range(iteration + 1):
            size = min(sizes.size(k), pairs)
            if after + size > pairs:
                epoch, after = epoch + 1, 0
            after += size
        first = after - size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(pairs, generator=generator)[first : first + size].tolist()
