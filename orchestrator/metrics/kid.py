"""Kernel distance between features of samples and of real data; with Inception features this is KID."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch_fidelity.metric_kid import kernel_poly, mmd2  # type: ignore[import-untyped]

from orchestrator.datasets.base import Dataset
from orchestrator.metrics._features import FeatureMetric
from orchestrator.metrics.base import Array, Summary, summarise

AT_ONCE = 10
"""Blocks of real features held in memory (80 MB for Inception's); each group takes one pass over all real features."""

KERNEL = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
"""The kernel (x · y / F + 1)^3, torch-fidelity's default."""


@dataclass(frozen=True)
class KID(FeatureMetric):
    """Squared maximum mean discrepancy of features (Binkowski et al. 2018), unbiased, over disjoint blocks of samples.

    The value is the mean over blocks, with its standard error. The kernel and the estimator per block are those of
    torch-fidelity, which draws random, overlapping subsets instead. Samples after the last full block are left out.
    Blocks of real data are drawn at random with a fixed seed: real data often come sorted by class or with the classes
    in turn, and each block has to represent all of them.

    Attributes:
        block: Samples per block; reduced to the number of samples or real samples if that is smaller.
    """

    block: int = 1000

    summary_options: ClassVar[frozenset[str]] = FeatureMetric.summary_options | {"block"}

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"block must be at least 2, got {self.block}")

    @property
    def column(self) -> str:
        return f"kid[{self.features}]"

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        real = self.reference_features(real)
        size = min(self.block, _rows(shards), _rows(real))
        if size < 2:
            raise ValueError("KID needs at least two samples and two real samples")
        values = [
            _distance(mine, theirs) for mine, theirs in zip(_blocks(shards, size), _drawn(real, size), strict=False)
        ]
        summary = summarise(values)
        return Summary(summary.mean, summary.stderr if len(values) > 1 else math.nan, size * len(values), 0)


def _rows(shards: Iterable[Array]) -> int:
    """Number of rows in all shards.

    Raises:
        ValueError: Some rows are not finite; without them the rest would be another distribution.
    """
    count = bad = 0
    for shard in shards:
        count += len(shard)
        bad += int((~np.isfinite(shard).all(axis=1)).sum())
    if bad:
        raise ValueError(f"features of {bad} of {count} samples are not finite; leave out the solver that made them")
    return count


def _blocks(shards: Iterable[Array], size: int) -> Iterator[Array]:
    """Full blocks of ``size`` rows, in order."""
    held: list[Array] = []
    count = 0
    for shard in shards:
        held.append(shard)
        count += len(shard)
        while count >= size:
            rows = np.concatenate(held)
            yield rows[:size]
            held, count = [rows[size:]], count - size


def _drawn(shards: Iterable[Array], size: int) -> Iterator[Array]:
    """Disjoint random blocks of ``size`` rows, the same in every call; starts over after the last block."""
    order = np.random.Generator(np.random.Philox(0)).permutation(_rows(shards))
    blocks = [np.sort(order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
    while True:
        for first in range(0, len(blocks), AT_ONCE):
            yield from _taken(shards, blocks[first : first + AT_ONCE])


def _taken(shards: Iterable[Array], blocks: list[npt.NDArray[np.int64]]) -> list[Array]:
    """Collect the rows of several blocks, given by sorted row indices, in one pass over the shards."""
    parts: list[list[Array]] = [[] for _ in blocks]
    start = 0
    for shard in shards:
        for rows, part in zip(blocks, parts, strict=True):
            low, high = np.searchsorted(rows, (start, start + len(shard)))
            part.append(shard[rows[low:high] - start])
        start += len(shard)
    return [np.concatenate(part) for part in parts]


def _distance(samples: Array, real: Array) -> float:
    x, y = samples.astype(np.float64), real.astype(np.float64)
    return float(mmd2(kernel_poly(x, x, **KERNEL), kernel_poly(x, y, **KERNEL), kernel_poly(y, y, **KERNEL)))


METRIC = KID
