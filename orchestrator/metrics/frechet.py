"""Frechet distance between samples and real data, or ground truth, by their own values: for any kind of sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.metrics.fid import FID


@dataclass(frozen=True)
class Frechet(FID):
    """Frechet distance of raw samples (Heusel et al. 2017): means and covariances, of more samples than values.

    Between N samples and M real samples of F values with equal variances v it is
    biased upwards by about v F (F + 5) / 4 (1 / N + 1 / M), so compare only values of equal N. Against ground truth of
    the same pairs an exact solver has distance 0. N and M must be above F; ten times as many are better.

    Attributes:
        features: 'raw', the values of a sample, or any feature extractor; part of the metric's name.
    """

    features: str = "raw"

    falls_back: ClassVar[bool] = True

    @property
    def column(self) -> str:
        return f"frechet[{self.features}]"

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:
        super().check_samples(shape, count)
        dim = self.extractor.dim(shape)
        if count <= dim:
            raise ValueError(
                f"{self.column} fits a covariance to {dim:,} features per sample, which {count:,} samples do not "
                f"determine; use at least {dim + 1:,} samples, preferably {10 * dim:,}, or the metric "
                f"sliced_wasserstein"
            )


METRIC = Frechet
