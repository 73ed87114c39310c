"""Frechet distance between features of samples and of real data; with Inception features this is FID."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from orchestrator.datasets.base import Dataset
from orchestrator.features.moments import Moments, frechet_distance
from orchestrator.metrics._features import FeatureMetric
from orchestrator.metrics.base import Array, Summary


@dataclass(frozen=True)
class FID(FeatureMetric):
    """Frechet distance of features (Heusel et al. 2017), by torch-fidelity's formula, from exactly merged moments.

    It is biased upwards by about F / N, so compare only values with the same features and the same number of samples.
    With N <= F it is still defined, as in torch-fidelity, but means little.
    """

    relative_to_truth = True
    moments_suffice: ClassVar[bool] = True

    @property
    def column(self) -> str:
        return f"fid[{self.features}]"

    @cached_property
    def _real(self) -> dict[Hashable, Moments]:
        """Cache of the moments of real samples, shared by all solvers."""
        return {}

    def summarise(self, shards: Iterable[Array], dataset: Dataset, real: Iterable[Array] | None = None) -> Summary:
        samples = self.moments(shards)
        return Summary(frechet_distance(samples, self._reference(real)), math.nan, samples.count, 0)

    def _reference(self, real: Iterable[Array] | None) -> Moments:
        if self.statistics is not None:
            return self.statistics
        assert real is not None
        if not isinstance(real, Hashable):
            return self.moments(real)
        if real not in self._real:
            self._real[real] = self.moments(real)
        return self._real[real]


METRIC = FID
