"""Measurements of a dataset's real samples, made once, shard by shard and resumable.

Metrics that compare distributions (FID, KID) compare a solver's samples with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.features.moments import Moments, spread
from orchestrator.hosts.protocols import ScorerProtocol
from orchestrator.metrics.base import IMAGE_RANGE
from orchestrator.metrics.fid import FID
from orchestrator.metrics.measurements import Measured, MetricSpec
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import bar
from orchestrator.storage import Storage, digest_of

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
        shown_range: Values of the real samples that are mapped to -1 and 1.
    """

    spec: MetricSpec
    key: str
    dataset: Mapping[str, Any]
    indices: range
    shown_range: tuple[float, float]

    def request(self) -> Request[int]:
        """The request that a scorer answers."""
        return Request.of(
            ScorerProtocol.measure_real,
            metric=self.spec,
            key=self.key,
            dataset=self.dataset,
            indices=self.indices,
            shown_range=self.shown_range,
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
        shown_range: Values of the real samples that are mapped to -1 and 1.
    """

    storage: Storage
    spec: MetricSpec
    dataset: Mapping[str, Any]
    content: str
    count: int
    shown_range: tuple[float, float] = IMAGE_RANGE

    @property
    def measured(self) -> Measured:
        """The stored measurements, complete or not."""
        content = self.content if self.shown_range == IMAGE_RANGE else digest_of([self.content, self.shown_range])
        return Measured(self.storage, SOURCE, content[:16], self.spec.identity, -(-self.count // SHARD))

    def missing(self) -> list[RealShard]:
        """The shards that are not measured yet."""
        measured = self.measured
        return [
            RealShard(
                self.spec,
                measured.key(shard),
                self.dataset,
                range(shard * SHARD, min((shard + 1) * SHARD, self.count)),
                self.shown_range,
            )
            for shard in measured.missing()
        ]


def check_real_samples(spec: MetricSpec, source: Dataset, shape: tuple[int, ...], limits: tuple[float, float]) -> None:
    """Refuse real samples that a metric cannot compare with the model's.

    Args:
        spec: The metric.
        source: The dataset.
        shape: Shape of one of the model's samples, in the form that the metric sees.
        limits: Smallest and largest value of the model's data.

    Raises:
        ConfigError: Form, range, shape or number do not fit; the message names them and the remedy.
    """
    name = plugins.describe("datasets", source)["name"]
    form, sees = source.real_form, spec.metric.sees
    compares = f"metric {spec.metric.column!r} compares"
    remedy = "choose another reference, e.g. 'reference: ground_truth'"
    if "sound" in (form, sees) and form != sees:
        raise ConfigError(f"{compares} {sees}, but real samples of {name!r} are {form}; {remedy}")
    real_shape = tuple(source.real_samples([0]).shape[1:])
    if real_shape != shape:
        options = "set the dataset's options (side, grayscale), or " if form == "images" else ""
        raise ConfigError(
            f"{compares} samples of shape {shape} with real {form} of {name!r} of shape {real_shape}; {options}{remedy}"
        )
    if (sees, form) == ("samples", "images") and limits != IMAGE_RANGE:
        raise ConfigError(
            f"{compares} samples of a model whose data lie in [{limits[0]:g}, {limits[1]:g}] with images of "
            f"{name!r}, which lie in [-1, 1]; {remedy}, or real samples from a dataset 'tensors'"
        )
    try:
        spec.metric.check_samples(shape, source.real_count())
    except ValueError as error:
        raise ConfigError(f"real samples of {name!r}: {error}") from error


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
    fid: FID = plugins.build("metrics", spec.name, spec.options)
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
    moments = fid.moments(real.measured)
    chosen, parts, first = np.array(spread(count, keep)), [], 0
    for shard in real.measured:
        parts.append(shard[chosen[(chosen >= first) & (chosen < first + len(shard))] - first])
        first += len(shard)
    samples = np.concatenate(parts).astype(np.float32)
    return Moments(features, moments.count, moments.mean, moments.covariance, samples)
