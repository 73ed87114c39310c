"""Kernel distance between features of samples and of real data: KID, where the features are Inception's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch_fidelity.metric_kid import kernel_poly, mmd2  # type: ignore[import-untyped]

from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.metrics._features import FeatureMetric
from orchestrator.metrics.base import Array, Summary, summarise_values

AT_ONCE = 10
"""Blocks of real features in memory at once: 80 MB for Inception's, gone through again for each as many blocks."""

KERNEL = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
"""(x · y / F + 1)^3, as torch-fidelity has it by default."""


@dataclass(frozen=True)
class KID(FeatureMetric):
    """Squared maximum mean discrepancy of features (Binkowski et al. 2018), unbiased, over disjoint blocks of samples.

    The mean over blocks, and its standard error. torch-fidelity draws its subsets at random instead, so that they
    overlap; the kernel and the estimator of a block are torch-fidelity's. Samples after the last whole block are left
    out. Blocks of real data are drawn at random, and always the same: real data come sorted by class, or with classes
    in turn, and a block has to stand for all of them.

    Attributes:
        block: Samples in a block; all of them where there are fewer, or fewer real ones.
    """

    block: int = 1000

    summary_options: ClassVar[frozenset[str]] = FeatureMetric.summary_options | {"block"}

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"block must be at least 2, got {self.block}")

    @property
    def column(self) -> str:
        return f"kid[{self.features}]"

    def check(self, dataset: Dataset) -> None:
        super().check(dataset)
        if self.statistics is not None and self.statistics.samples is None:
            raise ConfigError(
                f"reference {self.reference!r} holds mean and covariance alone, and KID needs features of samples; "
                f"make statistics that hold some with `bespoke reference`"
            )

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        if self.statistics is not None:
            assert self.statistics.samples is not None
            real = [self.statistics.samples.astype(np.float64)]
        assert real is not None
        size = min(self.block, _rows(shards), _rows(real))
        if size < 2:
            raise ValueError("KID needs at least two samples and two real ones")
        values = [
            _distance(mine, theirs) for mine, theirs in zip(_blocks(shards, size), _drawn(real, size), strict=False)
        ]
        found = summarise_values(values)
        return Summary(found.mean, found.stderr if len(values) > 1 else math.nan, size * len(values), 0)


def _rows(shards: Iterable[Array]) -> int:
    """How many rows there are.

    Raises:
        ValueError: Some are not finite: without them it would be another distribution.
    """
    count = bad = 0
    for shard in shards:
        count += len(shard)
        bad += int((~np.isfinite(shard).all(axis=1)).sum())
    if bad:
        raise ValueError(f"features of {bad} of {count} samples are not finite; leave out the solver that made them")
    return count


def _blocks(shards: Iterable[Array], size: int) -> Iterator[Array]:
    """Whole blocks of this many rows, in order."""
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
    """Disjoint random blocks of this many rows, the same each time; from the first again when all were drawn."""
    order = np.random.Generator(np.random.Philox(0)).permutation(_rows(shards))
    blocks = [np.sort(order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
    while True:
        for first in range(0, len(blocks), AT_ONCE):
            yield from _taken(shards, blocks[first : first + AT_ONCE])


def _taken(shards: Iterable[Array], blocks: list[npt.NDArray[np.int64]]) -> list[Array]:
    """These rows, from one pass over all; rows of a block in order."""
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
