"""Base class of distances between feature distributions: the features, and the real data they are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.features.base import FeatureExtractor
from orchestrator.features.moments import FeatureStatistics, Moments, reference_moments
from orchestrator.metrics.base import Array, Batch, Media, Metric
from orchestrator.plugins import FILE_OR_NAME, options_of


@dataclass(frozen=True)
class FeatureMetric(Metric):
    """A distance between the features of samples and of real data.

    Attributes:
        features: Feature extractor plugin; part of the metric's name.
        features_options: Options of the extractor.
        reference: The real data. None: real samples of the evaluated dataset. Otherwise the name of statistics shipped
            with the package, a file of statistics (``.safetensors`` from `bespoke reference`, or ``.npz`` with ``mu``
            and ``sigma``), or another dataset, ``{name: …, options: {…}}``.
    """

    features: str = "inception"
    features_options: dict[str, Any] = field(default_factory=dict, metadata=options_of("features", "features"))
    reference: Any = field(default=None, metadata=FILE_OR_NAME | options_of("datasets"))

    higher_is_better: ClassVar[bool] = False
    sees: ClassVar[Media] = "images"
    paired: ClassVar[bool] = False
    fewest: ClassVar[int] = 2
    summary_options: ClassVar[frozenset[str]] = frozenset({"reference"})

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
        if self.reference is None or isinstance(self.reference, dict):
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
        if self.reference is None and not dataset.real_count():
            raise ConfigError(
                f"{type(dataset).__name__} has no real samples to compare with; set the option 'reference' to shipped "
                f"statistics, to a file made by `bespoke reference`, or to another dataset"
            )

    def real(self, dataset: Dataset) -> Dataset | None:
        if self.statistics is not None:
            return None
        if self.reference is None:
            return dataset
        if set(self.reference) - {"name", "options"} or "name" not in self.reference:
            raise ConfigError(f"reference must be {{name: …, options: {{…}}}}, got {self.reference}")
        return plugins.build("datasets", self.reference["name"], self.reference.get("options"))

    def measure(self, batch: Batch) -> Tensor:
        return self.extractor(batch.samples).float()


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


def moments_of(features: str, shards: Iterable[Array]) -> Moments:
    """Moments of stored features, (rows, F) per shard, with one shard in memory at a time.

    Raises:
        ValueError: There are fewer than two samples, or features that are not finite.
    """
    statistics: FeatureStatistics | None = None
    for shard in shards:
        if statistics is None:
            statistics = FeatureStatistics(features, shard.shape[1])
        statistics.add(shard)
    if statistics is None:
        raise ValueError("no samples; give at least one")
    return statistics.moments(at_least=2)
