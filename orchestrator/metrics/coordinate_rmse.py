"""Root mean squared error of every coordinate, or group of coordinates, against ground truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Array, Batch, Metric, SplitSummary, check_comparable


@dataclass(frozen=True)
class CoordinateRMSE(Metric):
    """The largest RMSE of all coordinates, such as channels or joints, with its name and their mean beside it.

    Each is a root of the mean over samples; ``scores.parquet`` has all of them. It shows what one number over all
    coordinates hides: one channel of a series, one joint of a trajectory, one column of a table that a solver gets
    wrong.

    Attributes:
        axis: Axis of a sample that holds the coordinates, from 0; the error is also a mean over the others. None: every
            value of a sample is a coordinate, named by its index in the flattened sample.
        groups: Indices along the axis by the name of a group, e.g. ``{arm: [0, 1, 2], gripper: [3]}``; coordinates in
            no group are left out. None: every coordinate by itself.
    """

    axis: int | None = None
    groups: Mapping[str, Any] | None = field(default=None, hash=False)

    higher_is_better: ClassVar[bool] = False
    log_axis: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.axis is not None and self.axis < 0:
            raise ValueError(f"axis must be at least 0, the first axis of a sample, got {self.axis}")
        for name, indices in (self.groups or {}).items():
            if not isinstance(indices, list | tuple) or not indices or not all(_is_index(i) for i in indices):
                raise ValueError(f"group {name!r} must list indices from 0, e.g. [0, 1], got {indices!r}")
        if self.groups is not None and not self.groups:
            raise ValueError("groups is empty; name at least one, or leave the option out")

    @property
    def column(self) -> str:
        of = [f"axis {self.axis}"] * (self.axis is not None) + ["groups"] * (self.groups is not None)
        return f"coordinate_rmse[{', '.join(of)}]" if of else "coordinate_rmse"

    def check(self, dataset: Dataset) -> None:
        if getattr(dataset, "mask", None) is not None:
            raise ConfigError(
                f"metric {self.column!r} weighs all samples of a coordinate alike, but the dataset's mask "
                f"{dataset.mask!r} leaves out entries of some; use 'rmse', which takes masks into account"  # type: ignore[attr-defined]
            )

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:
        if self.axis is not None and self.axis >= len(shape):
            raise ValueError(f"{self.column}: samples of shape {shape} have no axis {self.axis}; use a smaller one")
        size = math.prod(shape) if self.axis is None else shape[self.axis]
        for name, indices in (self.groups or {}).items():
            if max(indices) >= size:
                raise ValueError(
                    f"{self.column}: group {name!r} has index {max(indices)}, but there are {size} coordinates, from 0"
                )

    def measure(self, batch: Batch) -> Tensor:
        """Squared errors by coordinate or group, (B, K), float64."""
        assert batch.reference is not None
        check_comparable(batch.samples, batch.reference)
        squares = (batch.samples.double() - batch.reference.double()).square()
        if self.axis is not None:
            squares = squares.movedim(1 + self.axis, 1).flatten(2).mean(dim=2) if squares.ndim > 2 else squares
        squares = squares.flatten(1)
        if self.groups is None:
            return squares
        return torch.stack([squares[:, list(indices)].mean(dim=1) for indices in self.groups.values()], dim=1)

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> SplitSummary:
        values = np.concatenate(list(shards))
        finite = values[np.isfinite(values).all(axis=1)]
        count, omitted = len(finite), len(values) - len(finite)
        if not count:
            return SplitSummary(math.nan, math.nan, 0, omitted, (), math.nan)
        roots = np.sqrt(finite.mean(axis=0))
        # The error of a root, to first order.
        spread = finite.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros(len(roots))
        stderrs = np.divide(spread, 2 * roots, out=np.zeros(len(roots)), where=roots > 0)
        names = self.groups or range(len(roots))
        parts = tuple((str(n), float(r), float(e)) for n, r, e in zip(names, roots, stderrs, strict=True))
        worst = int(roots.argmax())
        return SplitSummary(*parts[worst][1:], count, omitted, parts, float(roots.mean()))

    def resampled(self, values: Array, weights: Array) -> Array:
        means = weights @ values / weights.sum(axis=1, keepdims=True)
        largest: Array = np.sqrt(means).max(axis=1)
        return largest


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


METRIC = CoordinateRMSE
