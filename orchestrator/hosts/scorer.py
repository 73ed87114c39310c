"""The scorer: holds the networks of metrics and measures samples that hosts have written to the storage.

A plain class, from which ``pool`` makes actors. Everything in a scorer can be rebuilt, so it may die at any moment. It
writes its measurements to the storage, shard by shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.hosts.media import MediaShard
from orchestrator.hosts.protocols import ScorerProtocol
from orchestrator.hosts.settings import ScorerSettings
from orchestrator.hosts.work import Work
from orchestrator.metrics.base import Batch, Metric, to_unit_range
from orchestrator.metrics.measurements import MetricSpec, write_values
from orchestrator.storage import Storage, canonical_json


class Scorer(ScorerProtocol):
    """The networks of metrics on one device."""

    BATCHED: ClassVar[dict[str, str]] = {}

    def __init__(self, settings: ScorerSettings):
        self.settings = settings
        self.work = Work()
        self.storage = Storage.at(settings.storage)
        self._built: dict[str, Any] = {}
        torch.set_num_threads(settings.threads)

    def process_id(self) -> int:
        return os.getpid()

    def measure(
        self,
        metrics: Sequence[MetricSpec],
        keys: Sequence[str],
        media: str,
        dataset: Mapping[str, Any],
        seed: int,
        first: int,
    ) -> int:
        shard = MediaShard.read(self.storage, media)
        source = self._plugin("datasets", dataset["name"], dataset["options"])
        indices = [first + i for i in range(len(shard.finite)) if shard.finite[i]]
        conditions = source.conditions(seed, indices) if indices else np.zeros(0, dtype=np.int64)

        for spec, key in zip(metrics, keys, strict=True):
            metric = self._plugin("metrics", spec.name, spec.options)
            samples = shard.forms[metric.sees]

            def batch(rows: slice, samples: Tensor = samples) -> Batch:
                return Batch(samples[rows].to(self.settings.device), conditions[rows], source, rate=shard.rate)

            measured = self._in_batches(metric, len(indices), batch)
            values = np.full((len(shard.finite), *measured.shape[1:]), np.nan, dtype=measured.numpy().dtype)
            values[shard.finite] = measured.numpy()
            write_values(self.storage, key, values)
        return len(shard.finite)

    def measure_real(
        self,
        metric: MetricSpec,
        key: str,
        dataset: Mapping[str, Any],
        indices: Sequence[int],
        shown_range: tuple[float, float] = (-1.0, 1.0),
    ) -> int:
        source = self._plugin("datasets", dataset["name"], dataset["options"])
        built = self._plugin("metrics", metric.name, metric.options)

        def batch(rows: slice) -> Batch:
            samples = torch.from_numpy(source.real_samples(list(indices)[rows])).to(self.settings.device)
            return Batch(to_unit_range(samples, shown_range), None, source)

        write_values(self.storage, key, self._in_batches(built, len(indices), batch).numpy())
        return len(indices)

    def _in_batches(self, metric: Metric, count: int, batch: Callable[[slice], Batch]) -> Tensor:
        size = self.settings.batch_size
        with torch.no_grad():
            parts = [metric.measure(batch(slice(i, min(i + size, count)))).cpu() for i in range(0, count, size)]
        self.work.scored += count
        return torch.cat(parts) if parts else torch.zeros(0, metric.width)

    def _plugin(self, kind: str, name: str, options: Mapping[str, Any]) -> Any:
        """The plugin, built only once, since metrics hold networks and datasets read files."""
        key = canonical_json([kind, name, dict(options)])
        if key not in self._built:
            self._built[key] = plugins.build(kind, name, options)
        return self._built[key]
