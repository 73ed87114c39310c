"""Settings from which hosts and scorers are built. Sent to their processes instead of the objects themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.models.base import Precision


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """How to make a host: what is sent to an actor instead of the model.

    Attributes:
        adapter: Model adapter plugin.
        options: The adapter's options.
        storage: Storage root of the pairs.
        device: 'cpu' or a CUDA device.
        threads: torch threads; more than the host's share of cores makes it many times slower.
        memory_bytes: What a distillation step may hold beside the model: batches shrink to fit.
        precision: What the network computes in during distillation steps, by torch's autocast.
        checkpoint: Whether gradients keep no activations but those of one evaluation.
        compile: Whether distillation steps use the network compiled by torch.compile.

    The last three concern distillation alone: pairs, grids, starts and scores are of the network as it was loaded.
    """

    adapter: str
    options: dict[str, Any]
    storage: str
    device: str = "cpu"
    threads: int = 1
    memory_bytes: int = 10**9
    precision: Precision = "float32"
    checkpoint: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """How to make a scorer.

    Attributes:
        storage: Storage root of samples and measurements.
        device: 'cpu' or a CUDA device: where samples are put before a metric sees them.
        threads: torch threads.
        batch_size: Samples that go through a metric's network at once.
    """

    storage: str
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 64
