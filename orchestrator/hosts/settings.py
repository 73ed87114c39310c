"""What is sent to make a host, and what it tells of its model: light to import, for whoever only asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.models.base import Precision
from solvers.schedulers.base import Scheduler


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

    def worker(self) -> type:
        """The class that these are settings of."""
        from orchestrator.hosts.host import Host  # imported where a host is made: trials need not hold what it imports

        return Host


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the rest of the system needs to know of a model without holding it."""

    name: str
    digest: str
    shape: tuple[int, ...]
    prediction: str
    scheduler: Scheduler
    native_scheduler: str
    data_range: float
    device_class: str
    parameters: int
    rate: int | None
