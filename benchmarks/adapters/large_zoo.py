"""A model adapter for benchmarks: a zoo model with the loading time and memory of a large one.

It imitates a large checkpoint: the constructor sleeps, and the further weights are held but never used. Samples, digest
and pairs are those of the small model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.errors import ConfigError
from orchestrator.models.zoo.adapter import ZooModel


@dataclass
class LargeZooModel(ZooModel):
    """A zoo model that loads slowly and holds unused weights.

    Attributes:
        weights: As :class:`ZooModel`.
        load_seconds: Seconds that the constructor sleeps.
        weights_mb: Size of the further weights, 2^20 bytes.
    """

    load_seconds: float = 0.0
    weights_mb: int = 0

    def __post_init__(self) -> None:
        time.sleep(self.load_seconds)
        super().__post_init__()
        # Ones instead of empty: pages that were never written to do not take memory.
        self.further_weights = torch.ones(self.weights_mb * 2**18, dtype=torch.float32)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        for name in ("load_seconds", "weights_mb"):
            value = options.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name} must be 0 or more, got {value!r}")
        super().check({key: value for key, value in options.items() if key not in ("load_seconds", "weights_mb")})


ADAPTER = LargeZooModel
