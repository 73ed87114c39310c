"""A model adapter for benchmarks: a zoo model that loads and weighs as a large one would.

It stands for a large checkpoint, and is none: loading sleeps, and the further weights are held but never used, so that
samples, digest and pairs are those of the small model.
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
    """A zoo model behind a slow load.

    Attributes:
        weights: As :class:`ZooModel`.
        load_seconds: Seconds that its constructor sleeps.
        weights_mb: Further weights it holds, 2^20 bytes.
    """

    load_seconds: float = 0.0
    weights_mb: int = 0

    def __post_init__(self) -> None:
        time.sleep(self.load_seconds)
        super().__post_init__()
        # Ones, not empty: pages that nobody wrote to take no memory.
        self.further_weights = torch.ones(self.weights_mb * 2**18, dtype=torch.float32)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        for name in ("load_seconds", "weights_mb"):
            value = options.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name} must be 0 or more, got {value!r}")
        super().check({key: value for key, value in options.items() if key not in ("load_seconds", "weights_mb")})


ADAPTER = LargeZooModel
