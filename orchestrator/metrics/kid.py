"""Kernel distance between features of samples and of real data: KID, where the features are Inception's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch_fidelity.metric_kid import kernel_poly, mmd2  # type: ignore[import-untyped]

from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.metrics._features import FeatureMetric
from orchestrator.metrics.base import Array, Summary, summarise_values

KERNEL = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
"""(x · y / F + 1)^3, as torch-fidelity has it by default."""


@dataclass(frozen=True)
class KID(FeatureMetric):
    """Squared maximum mean discrepancy of features (Binkowski et al. 2018), unbiased, over disjoint blocks of samples.

    The mean over blocks, and its standard error. torch-fidelity draws its subsets at random instead, so that they
    overlap; the kernel and the estimator of a block are torch-fidelity's. Samples after the last whole block are left
    out.

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
        against = itertools.chain.from_iterable(_blocks(real, size) for _ in itertools.count())
        values = [_distance(mine, theirs) for mine, theirs in zip(_blocks(shards, size), against, strict=False)]
        found = summarise_values(values)
        return Summary(found.mean, found.stderr if len(values) > 1 else math.nan, size * len(values), 0)


def _rows(shards: Iterable[Array]) -> int:
    return sum(len(shard) for shard in shards)


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


def _distance(samples: Array, real: Array) -> float:
    x, y = samples.astype(np.float64), real.astype(np.float64)
    return float(mmd2(kernel_poly(x, x, **KERNEL), kernel_poly(x, y, **KERNEL), kernel_poly(y, y, **KERNEL)))


METRIC = KID
