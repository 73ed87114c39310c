"""Settings from which hosts and scorers are built. Sent to their processes instead of the objects themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.models.base import Precision


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Settings of a host.

    Attributes:
        adapter: Model adapter plugin.
        options: The adapter's options.
        storage: Storage root of the pairs.
        device: 'cpu' or a CUDA device.
        threads: torch threads; more than the host's share of cores makes it many times slower.
        memory_bytes: Memory for a distillation step, beside the model; batches shrink to fit.
        precision: Precision of the network in distillation steps, by torch's autocast.
        checkpoint: Whether gradients keep the activations of only one evaluation.
        compile: Whether distillation steps use the network compiled by torch.compile.

    The last three affect only distillation: pairs, grids, starts and scores use the network as loaded.
    """

    adapter: str
    options: dict[str, Any] = field(repr=False)
    storage: str = field(repr=False)
    device: str = "cpu"
    threads: int = 1
    memory_bytes: int = 10**9
    precision: Precision = "float32"
    checkpoint: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """Settings of a scorer.

    Attributes:
        storage: Storage root of samples and measurements.
        device: 'cpu' or a CUDA device, to which samples are moved before they are measured.
        threads: torch threads.
        batch_size: Samples per forward pass of a metric's network.
    """

    storage: str = field(repr=False)
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 64
