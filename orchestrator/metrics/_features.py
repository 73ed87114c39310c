"""Base class of distances between feature distributions: the features, and the real data they are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from torch import Tensor

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.features.base import FeatureExtractor
from orchestrator.features.moments import FeatureStatistics, Moments, reference_moments, unit_of
from orchestrator.metrics.base import Array, Batch, Media, Metric
from orchestrator.plugins import FILE_OR_NAME, options_of

TRUTH: Final = "ground_truth"
"""The reference that stands for ground truth of the same pairs."""


@dataclass(frozen=True)
class FeatureMetric(Metric):
    """A distance between the features of samples and of real data.

    Attributes:
        features: Feature extractor plugin; part of the metric's name.
        features_options: Options of the extractor.
        reference: What samples are compared with. None: real samples of the evaluated dataset. 'ground_truth': ground
            truth of the same pairs, which is also the default of frechet and sliced_wasserstein for datasets without
            real samples. Otherwise the name of statistics shipped with the package, a file of statistics
            (``.safetensors`` from `bespoke reference`, or ``.npz`` with ``mu`` and ``sigma``), or another dataset,
            ``{name: …, options: {…}}``.
    """

    features: str = "inception"
    features_options: dict[str, Any] = field(default_factory=dict, metadata=options_of("features", "features"))
    reference: Any = field(default=None, metadata=FILE_OR_NAME | options_of("datasets"))

    higher_is_better: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    needs_all: ClassVar[bool] = True
    fewest: ClassVar[int] = 2
    summary_options: ClassVar[frozenset[str]] = frozenset({"reference"})
    falls_back: ClassVar[bool] = False
    """Whether ground truth stands in for a dataset without real samples."""
    moments_suffice: ClassVar[bool] = False
    """Whether statistics without the features of samples can be the reference."""

    @property
    def sees(self) -> Media:  # type: ignore[override]
        # Of the class, so that samples it cannot see are refused before its weights are looked for.
        return "images" if plugins.load("features", self.features).images else "samples"

    @property
    def measured(self) -> str:
        return f"features[{self.features}]"

    def depends_on(self) -> Iterable[Any]:
        return (self.extractor.content,)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The feature extractor."""
        return plugins.build("features", self.features, self.features_options)

    @cached_property
    def statistics(self) -> Moments | None:
        """The statistics that ``reference`` names; None if real samples have to be measured instead.

        Raises:
            ConfigError: There are none, they are of other features, or the file is not a statistics file.
        """
        if self.reference in (None, TRUTH) or isinstance(self.reference, dict):
            return None
        path = Path(str(self.reference))
        if path.suffix not in (".npz", ".safetensors"):
            return reference_moments(self.features, str(self.reference))
        if not path.is_file():
            raise ConfigError(f"no reference statistics at {path}; make them with `bespoke reference`")
        moments = _read(path, self.features)
        if moments.features != self.features:
            raise ConfigError(
                f"{path} holds statistics of features {moments.features!r}, but the metric uses {self.features!r}"
            )
        return moments

    def check(self, dataset: Dataset) -> None:
        _ = self.extractor, self.statistics
        if self.reference is None and not self.falls_back and not dataset.real_count():
            raise ConfigError(
                f"{type(dataset).__name__} has no real samples to compare with; set the option 'reference' to shipped "
                f"statistics, to a file made by `bespoke reference`, to another dataset, or to {TRUTH}"
            )

        if self.statistics is not None and self.statistics.samples is None and not self.moments_suffice:
            raise ConfigError(
                f"reference {self.reference!r} holds only mean and covariance, but {self.column} needs features of "
                f"samples; make statistics that include them with `bespoke reference`"
            )

    def reference_features(self, real: Iterable[Array] | None) -> Iterable[Array]:
        """Features of the reference: those of the statistics, or the measured ones."""
        if self.statistics is not None:
            assert self.statistics.samples is not None
            return [self.statistics.samples.astype(np.float64)]
        assert real is not None
        return real

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:
        dim = self.extractor.dim(shape)
        if self.statistics is not None and len(self.statistics.mean) != dim:
            raise ValueError(
                f"reference {self.reference!r} holds statistics of {len(self.statistics.mean)} features, but "
                f"samples of shape {shape} have {dim}; choose statistics of the same kind of samples"
            )

    def compares_with_truth(self, dataset: Dataset) -> bool:
        return self.reference == TRUTH or (self.reference is None and self.falls_back and not dataset.real_count())

    def compared_with(self, dataset: Dataset) -> str:
        if self.compares_with_truth(dataset):
            return "ground truth of the same pairs"
        real = self.real(dataset)
        if real is None:
            return f"the statistics {Path(str(self.reference)).name!r}"
        return f"{real.real_count():,} real samples of {type(real).__name__}"

    def real(self, dataset: Dataset) -> Dataset | None:
        if self.statistics is not None or self.compares_with_truth(dataset):
            return None
        if self.reference is None:
            return dataset
        if set(self.reference) - {"name", "options"} or "name" not in self.reference:
            raise ConfigError(f"reference must be {{name: …, options: {{…}}}}, got {self.reference}")
        return plugins.build("datasets", self.reference["name"], self.reference.get("options"))

    def measure(self, batch: Batch) -> Tensor:
        return self.extractor(batch.samples).float()

    def moments(self, shards: Iterable[Array]) -> Moments:
        """Moments of stored features, (rows, F) per shard, with one shard in memory at a time.

        Raises:
            ValueError: There are fewer than two samples, or features that are not finite.
        """
        # Networks' features are within bounds; raw samples have any scale.
        unit = 1.0 if self.sees == "images" else unit_of(max(float(np.abs(shard).max(initial=0)) for shard in shards))
        statistics: FeatureStatistics | None = None
        for shard in shards:
            statistics = statistics or FeatureStatistics(self.features, shard.shape[1], unit)
            statistics.add(shard)
        if statistics is None:
            raise ValueError("no samples; give at least one")
        return statistics.moments(at_least=2)


def _read(path: Path, features: str) -> Moments:
    """Read a statistics file. An ``.npz`` does not name its features; they are taken to be ``features``."""
    try:
        if path.suffix == ".safetensors":
            return Moments.from_bytes(path.read_bytes())
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (file[name].astype(np.float64) for name in ("mu", "sigma"))
            if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
                raise ValueError(f"'mu' is of shape {mean.shape} and 'sigma' of shape {covariance.shape}")
            return Moments(features, 0, mean, covariance)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a statistics file: {error}; make one with `bespoke reference`") from error
