"""The pair spec: everything that ground-truth pairs depend on. Equal specs yield equal pairs."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.storage import digest_of

FORMAT = 1
"""Incremented whenever the same spec would yield different bytes."""


@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """Spec of a pair set.

    Pair i depends only on the spec and i: its noise on (seed, i), and the other pairs of its solver batch on i.

    Attributes:
        model_digest: sha256 of the model.
        conditioning: Dataset plugin and options that condition pair i. They locate the content, and do not decide
            anything by themselves: they are not part of the digest.
        content: sha256 of the content of that dataset which the conditioning of pairs depends on.
        guidance_scale: Guidance scale; 1 is unguided.
        shape: Shape of one sample.
        seed: Seed of noise and conditioning.
        count: Number of pairs.
        batch_size: Pairs per solver batch; all pairs of a batch take the same adaptive steps.
        shard_size: Pairs per Parquet file, a multiple of ``batch_size``.
        rtol, atol: Tolerances of dopri5.
        device_class: 'cpu' or the accelerator's name; shards of two classes are not mixed.
        trajectory: Whether the steps between x0 and x1 are kept, for objectives that score a solver's steps.
        format: Version of the procedure that makes pairs.
    """

    model_digest: str
    conditioning: dict[str, Any]
    content: str
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
        """First 16 hex digits of the sha256 of the spec; the name of its folder."""
        content = dataclasses.asdict(self)
        del content["conditioning"]  # the same content may lie elsewhere
        if not self.trajectory:
            del content["trajectory"]  # keeps the digests of stores that are older than this field
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
        """Read the spec from a manifest, whose content may be arbitrary.

        Raises:
            ValueError, KeyError, TypeError: The content is not a spec. The error for a wrong field names it and its
                value.
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
    ("model_digest", "device_class", "content"): lambda value: isinstance(value, str),
    ("conditioning",): lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
    ("guidance_scale", "rtol", "atol"): _number,
    ("shape",): lambda value: len(value) <= 8 and all(_whole(size, 1) for size in value),
    ("count", "batch_size", "shard_size"): lambda value: _whole(value, 1),
    ("seed", "format"): lambda value: _whole(value, 0),
    ("trajectory",): lambda value: isinstance(value, bool),
}
"""Validity check of each field of a spec."""
