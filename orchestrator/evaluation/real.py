"""Measurements of a dataset's real samples, made once, shard by shard and resumable.

Metrics that compare distributions (FID, KID) compare a solver's samples with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.features.moments import Moments, spread
from orchestrator.hosts.protocols import ScorerProtocol
from orchestrator.metrics._features import moments_of
from orchestrator.metrics.measurements import Measured, MetricSpec
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import bar
from orchestrator.storage import Storage

SOURCE = "real"
"""Name under which measurements of real samples are stored, in place of a solver's digest."""
SHARD = 1000
"""Real samples per shard."""


@dataclass(frozen=True)
class RealShard:
    """A shard of real samples that a metric has not measured yet.

    Attributes:
        spec: The metric.
        key: Storage key of the shard's measurements.
        dataset: Name and options of the dataset.
        indices: Indices of the real samples in the dataset.
    """

    spec: MetricSpec
    key: str
    dataset: Mapping[str, Any]
    indices: range

    def request(self) -> Request[int]:
        """The request that a scorer answers."""
        return Request.of(
            ScorerProtocol.measure_real, metric=self.spec, key=self.key, dataset=self.dataset, indices=self.indices
        )


@dataclass(frozen=True)
class RealSamples:
    """One metric's measurements of all real samples of a dataset.

    Attributes:
        storage: Storage of the measurements.
        spec: The metric.
        dataset: Name and options of the dataset.
        content: Its ``real_content``, under which measurements are stored: the samples themselves decide.
        count: Number of real samples in the dataset.
    """

    storage: Storage
    spec: MetricSpec
    dataset: Mapping[str, Any]
    content: str
    count: int

    @property
    def measured(self) -> Measured:
        """The stored measurements, complete or not."""
        return Measured(self.storage, SOURCE, self.content[:16], self.spec.identity, -(-self.count // SHARD))

    def missing(self) -> list[RealShard]:
        """The shards that are not measured yet."""
        measured = self.measured
        return [
            RealShard(
                self.spec, measured.key(shard), self.dataset, range(shard * SHARD, min((shard + 1) * SHARD, self.count))
            )
            for shard in measured.missing()
        ]


def reference_statistics(
    storage: Storage,
    scorers: Pool,
    features: str,
    features_options: Mapping[str, Any],
    dataset: Mapping[str, Any],
    keep: int,
) -> Moments:
    """Mean and covariance of the features of a dataset's real samples, and the features of some of them.

    Features are stored shard by shard, so a call that was killed resumes when it is repeated.

    Args:
        storage: Storage of the features; they stay there afterwards.
        scorers: Pool of scorers that measure.
        features, features_options: Name and options of the feature extractor plugin.
        dataset: Name and options of the dataset.
        keep: Number of samples whose features are kept, for kernel distances.

    Raises:
        ConfigError: The dataset has no real samples, or the extractor's weights are missing.
        PoolError: A shard could not be measured; the shards already measured stay stored.
    """
    options = {"features": features} | ({"features_options": dict(features_options)} if features_options else {})
    spec = MetricSpec("fid", options)
    source = plugins.build("datasets", dataset["name"], dataset["options"])
    count = source.real_count()
    if not count:
        raise ConfigError(f"dataset {dataset['name']!r} has no real samples; check its options")
    spec.metric.check(source)
    real = RealSamples(storage, spec, dataset, source.real_content, count)
    missing = real.missing()
    if missing:
        try:
            source.check_real()
        except ValueError as error:
            raise ConfigError(f"dataset {dataset['name']!r}: {error}") from error
    with bar(count, "image", f"features {features}") as progress:
        progress.update(count - sum(len(shard.indices) for shard in missing))
        for outcome in scorers.map(shard.request() for shard in missing):
            if outcome.error is not None:
                raise outcome.error
            progress.update(outcome.value)
    moments = moments_of(features, real.measured)
    chosen, parts, first = np.array(spread(count, keep)), [], 0
    for shard in real.measured:
        parts.append(shard[chosen[(chosen >= first) & (chosen < first + len(shard))] - first])
        first += len(shard)
    samples = np.concatenate(parts).astype(np.float32)
    return Moments(features, moments.count, moments.mean, moments.covariance, samples)
