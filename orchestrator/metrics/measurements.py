"""What has been measured: numbers of every sample, one small file a shard, under a name that follows from what was
measured of what. Whoever finds a file need not measure again; FID and KID of the same features find the same files.
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
from orchestrator.errors import StoreError
from orchestrator.metrics.base import Array, Metric
from orchestrator.storage import Storage, digest_of

FORMAT = 1
"""Raised whenever the same name would stand for other numbers."""
FINITE = "finite"
"""Name of the record of which samples are finite: every other measurement is read beside it."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric by name, with its options: what is sent to whoever measures.

    Attributes:
        name: The plugin.
        options: Its options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def metric(self) -> Metric:
        """The metric itself."""
        return plugins.build("metrics", self.name, dict(self.options))

    @property
    def identity(self) -> str:
        """Digest of all that its numbers of a sample depend on: equal for metrics that share them."""
        summary_only = self.metric.summary_options
        own = {key: value for key, value in self.options.items() if key not in summary_only}
        return digest_of([FORMAT, self.metric.measured, own])

    def __reduce__(self) -> tuple[Any, ...]:
        return MetricSpec, (self.name, dict(self.options))  # without the networks it may have loaded


@dataclass(frozen=True)
class Measured:
    """The numbers of one metric on the samples of one solver and one set of pairs (or on real samples).

    Attributes:
        storage: Where they are.
        source: What was measured: the solver's digest, or what stands for ground truth or real samples.
        of: Digest of the pair set, or of the dataset whose real samples these are.
        identity: :attr:`MetricSpec.identity`, or :data:`FINITE`.
        shards: How many there are when it is complete.
    """

    storage: Storage
    source: str
    of: str
    identity: str
    shards: int

    @property
    def folder(self) -> str:
        return f"measurements/{self.of}/{self.source}/{self.identity}"

    def key(self, shard: int) -> str:
        return f"{self.folder}/shard-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not measured yet."""
        there = set(self.storage.names(self.folder))
        return [shard for shard in range(self.shards) if f"shard-{shard:05d}.safetensors" not in there]

    def __iter__(self) -> Iterator[Array]:
        """The shards' numbers, (rows, K) each, in order; one in memory at a time.

        Raises:
            StoreError: A damaged one, which is deleted: it is measured again when this is run again.
        """
        for shard in range(self.shards):
            try:
                yield read_values(self.storage, self.key(shard))
            except StoreError:
                self.storage.delete(self.key(shard))
                raise


def write_values(storage: Storage, key: str, values: npt.NDArray[Any]) -> None:
    """Publish numbers of a shard's samples, (rows, K)."""
    storage.write(key, save({"values": np.ascontiguousarray(values)}))


def read_values(storage: Storage, key: str) -> Array:
    """The inverse of :func:`write_values`.

    Raises:
        StoreError: It is damaged.
    """
    try:
        return load(storage.read(key))["values"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"measurement {storage.location(key)} is damaged: {error}; run the same command again"
        ) from error
