"""Stored measurements: per-sample values, one small file per shard.

The file name is derived from the metric and from the samples that were measured, so a shard is never measured twice.
Metrics with the same measurements, such as FID and KID of the same features, share the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from orchestrator import plugins
from orchestrator.content import digest
from orchestrator.errors import ConfigError, StoreError
from orchestrator.metrics.base import Array, Metric
from orchestrator.storage import Storage, digest_of

FORMAT = 1
"""Version of the measurements; increased when a change would give other values under the same name."""
FINITE = "finite"
"""Name of the record of which samples are finite; it is stored beside the metrics' measurements."""


@dataclass(frozen=True)
class MetricSpec:
    """Name and options of a metric, as sent to hosts and scorers.

    Attributes:
        name: Name of the plugin.
        options: Options of the plugin.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def metric(self) -> Metric:
        """The metric, built on first use."""
        return plugins.build("metrics", self.name, dict(self.options))

    @cached_property
    def identity(self) -> str:
        """Digest of all that the measurements depend on; equal for metrics that share measurements."""
        return digest_of([FORMAT, self.metric.measured, digest(*self.metric.depends_on())])

    def check_samples(self, kind: str, shape: tuple[int, ...], image_shape: tuple[int, ...] | None, count: int) -> None:
        """Refuse samples that the metric cannot measure, before they are made.

        Args:
            kind: Kind of the model's samples: image, sound, vectors, ...
            shape: Shape of one sample.
            image_shape: Shape of a decoded image; None if it is not known yet.
            count: Number of samples.

        Raises:
            ConfigError: The metric is of another form of samples, other shapes, or more samples; names the remedy.
        """
        metric, makes = self.metric, {"image": "images", "sound": "sound"}.get(kind)
        if metric.sees not in ("samples", makes):
            hint = "; if they are images, set the model's option kind to image" if metric.sees == "images" else ""
            raise ConfigError(
                f"metric {self.name!r} measures {metric.sees}, but samples of the model are {makes or kind}, of shape "
                f"{shape}; remove it, or choose one for any kind: psnr, snr, rmse, coordinate_rmse, frechet or "
                f"sliced_wasserstein{hint}"
            )
        seen = {"samples": shape, "images": image_shape}.get(metric.sees)
        if seen is not None:
            try:
                metric.check_samples(seen, count)
            except ValueError as error:
                raise ConfigError(f"metric {self.name!r}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return MetricSpec, (self.name, dict(self.options))  # leaves out the metric, which may hold loaded networks


@dataclass(frozen=True)
class Measured:
    """One metric's measurements of the samples of one solver on one pair set, or of real samples.

    Attributes:
        storage: Storage of the measurements.
        source: Digest of the solver, or the fixed name that stands for ground truth or for real samples.
        of: Pairs digest, or digest of the real samples that were measured.
        identity: :attr:`MetricSpec.identity`, or :data:`FINITE`.
        shards: Number of shards in a complete measurement.
        cut: Rows of the last shard if the samples end within it, else 0. Its file has another name, since the whole
            shard may be measured as well.
    """

    storage: Storage
    source: str
    of: str
    identity: str
    shards: int
    cut: int = 0

    @property
    def folder(self) -> str:
        return f"measurements/{self.of}/{self.source}/{self.identity}"

    def key(self, shard: int) -> str:
        return f"{self.folder}/{self._file(shard)}"

    def _file(self, shard: int) -> str:
        cut = f"-{self.cut}" if self.cut and shard == self.shards - 1 else ""
        return f"shard-{shard:05d}{cut}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not measured yet."""
        names = set(self.storage.names(self.folder))
        return [shard for shard in range(self.shards) if self._file(shard) not in names]

    def __iter__(self) -> Iterator[Array]:
        """The measurements of each shard, (rows, K), in order; one shard is in memory at a time.

        Raises:
            StoreError: A shard is damaged. It is deleted, and measured again by the next run.
        """
        for shard in range(self.shards):
            try:
                yield read_values(self.storage, self.key(shard))
            except StoreError:
                self.storage.delete(self.key(shard))
                raise


def write_values(storage: Storage, key: str, values: npt.NDArray[Any]) -> None:
    """Store the measurements of a shard, (rows, K)."""
    storage.write(key, save({"values": np.ascontiguousarray(values)}))


def read_values(storage: Storage, key: str) -> Array:
    """Read what :func:`write_values` stored.

    Raises:
        StoreError: The file is damaged.
    """
    try:
        return load(storage.read(key))["values"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"measurement {storage.location(key)} is damaged: {error}; run the same command again"
        ) from error
