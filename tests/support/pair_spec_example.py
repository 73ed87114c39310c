"""A pair spec for tests that need a spec but no pairs."""

from __future__ import annotations

from typing import Any

from orchestrator import plugins
from orchestrator.pairs import PairSpec


def pair_spec(**changes: Any) -> PairSpec:
    """A spec of forty pairs in batches of eight and shards of sixteen, with these fields changed."""
    values: dict[str, Any] = {
        "model_digest": "m",
        "conditioning": {"name": "labels", "options": {"classes": 10}},
        "content": plugins.build("datasets", "labels").content,
        "guidance_scale": 1.0,
        "shape": (1, 8, 8),
        "seed": 0,
        "count": 40,
        "batch_size": 8,
        "shard_size": 16,
        "rtol": 1e-6,
        "atol": 1e-6,
        "device_class": "cpu",
    }
    return PairSpec(**values | changes)
