"""The pair spec: everything that ground-truth pairs depend on. Equal specs have equal pairs."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.storage import digest_of

FORMAT = 1
"""Raised whenever the same spec would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """Pair i is a function of (spec, i) alone: noise by (seed, i), neighbours in its solver batch by index.

    Attributes:
        model_digest: sha256 of the model.
        conditioning: Dataset plugin and options that condition pair i.
        guidance_scale: 1 is unguided.
        shape: Shape of one sample.
        seed: Seed of noise and conditioning.
        count: Number of pairs.
        batch_size: Pairs solved together: the adaptive solver's steps are shared within a batch.
        shard_size: Pairs per Parquet file, a multiple of ``batch_size``.
        rtol, atol: Tolerances of dopri5.
        device_class: 'cpu' or the accelerator's name; shards of two classes are not mixed.
        trajectory: Whether the steps between x0 and x1 are kept too: for objectives that score a solver's steps.
        format: Version of the way pairs are made.
    """

    model_digest: str
    conditioning: dict[str, Any]
    guidance_scale: float
    shape: tuple[int, ...]
    seed: int
    count: int
    batch_size: int
    shard_size: int
    rtol: float
    atol: float
    device_class: str
    trajectory: bool = False
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """sha256 of the spec, 16 hex digits: the name of its folder."""
        content = dataclasses.asdict(self)
        if not self.trajectory:
            del content["trajectory"]  # as it was before there were any: such stores are still good
        return digest_of(content)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard_indices(self, shard: int) -> range:
        """Global indices of the pairs of one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def batches(self, shard: int) -> list[range]:
        """The solver batches of one shard, by global index."""
        indices = self.shard_indices(shard)
        return [
            range(first, min(first + self.batch_size, indices.stop))
            for first in range(indices.start, indices.stop, self.batch_size)
        ]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PairSpec:
        """The spec of a manifest, which may hold anything.

        Raises:
            ValueError, KeyError, TypeError: It is no spec; where a field is wrong, its name and what it is.
        """
        spec = cls(**{**content, "shape": tuple(content["shape"])})
        for names, holds in _FIELDS.items():
            for name in names:
                if not holds(getattr(spec, name)):
                    raise ValueError(f"its {name!r} is {reprlib.repr(getattr(spec, name))}")
        return spec


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


_FIELDS: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("model_digest", "device_class"): lambda value: isinstance(value, str),
    ("conditioning",): lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
    ("guidance_scale", "rtol", "atol"): _number,
    ("shape",): lambda value: len(value) <= 8 and all(_whole(size, 1) for size in value),
    ("count", "batch_size", "shard_size"): lambda value: _whole(value, 1),
    ("seed", "format"): lambda value: _whole(value, 0),
    ("trajectory",): lambda value: isinstance(value, bool),
}
"""What each field of a spec must be."""
