"""The pair spec: everything that ground-truth pairs depend on, and how many of them are needed."""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.storage import digest_of

FORMAT = 2
"""Incremented whenever the same spec would yield different bytes. It begins the name of every pair set's folder."""


@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """Spec of a pair set, and the number of its pairs that are needed.

    Pair i depends only on i and :attr:`identity`: its noise on (seed, i), and the other pairs of its
    solver batch on i. So a set can grow, and whatever needs fewer pairs than it has uses the first ones.

    Attributes:
        model_digest: sha256 of the model.
        conditioning: Dataset plugin and options that condition pair i. They locate the content, and do not decide
            anything by themselves: they are not part of the digest.
        content: sha256 of the content of that dataset which the conditioning of pairs depends on.
        guidance_scale: Guidance scale; 1 is unguided.
        shape: Shape of one sample.
        seed: Seed of noise and conditioning.
        count: Number of pairs needed. Whole batches are made, so the set has up to ``batch_size - 1`` more.
        batch_size: Pairs per solver batch; all pairs of a batch take the same adaptive steps.
        shard_size: Pairs per shard, a multiple of ``batch_size``.
        rtol, atol: Tolerances of dopri5.
        device_class: 'cpu' or the accelerator's name; shards of two classes are not mixed.
        trajectory: Whether the steps between x0 and x1 are kept, for objectives that score a solver's steps.
        steps: Times t_0..t_n of the steps of all pairs (``pairs.steps``), which were chosen to be as accurate as the
            tolerances; None: each batch takes its own adaptive steps.
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
    steps: tuple[float, ...] | None = None
    format: int = FORMAT

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the pairs."""
        content = self.to_dict()
        del content["conditioning"]  # the same content may lie elsewhere
        return content

    @property
    def digest(self) -> str:
        """Name of the set's folder: the format, and the first 16 hex digits of the sha256 of :attr:`identity`."""
        return f"v{self.format}-{digest_of(self.identity)}"

    def to_dict(self) -> dict[str, Any]:
        """All fields but ``count``, and without ``steps`` if there are none. Inverse: :meth:`from_dict`."""
        content = dataclasses.asdict(self)
        del content["count"]
        if self.steps is None:
            del content["steps"]
        return content

    @property
    def name(self) -> str:
        """Name of these pairs, the first ``count`` of the set: its digest and ``count``."""
        return f"{self.digest}-{self.count}"

    @property
    def made(self) -> int:
        """Number of pairs that are made: ``count`` rounded up to whole batches."""
        return -(-self.count // self.batch_size) * self.batch_size

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard_indices(self, shard: int) -> range:
        """Global indices of the needed pairs of one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def batches(self, indices: range) -> list[range]:
        """The solver batches of these pairs, by global index; ``indices`` starts with a batch."""
        return [
            range(first, min(first + self.batch_size, indices.stop))
            for first in range(indices.start, indices.stop, self.batch_size)
        ]

    def gaps(self, present: Iterable[range]) -> list[range]:
        """Indices of the pairs that are still to be made, as ranges that do not cross the end of a shard.

        Args:
            present: Indices of the pairs that are made, as disjoint ranges. The gaps before the last one count as
                missing, even beyond :attr:`made`.
        """
        gaps = []
        at = 0
        ordered = sorted(present, key=lambda indices: indices.start)
        end = max([self.made, *(indices.stop for indices in ordered[-1:])])
        for indices in [*ordered, range(end, end)]:
            while at < indices.start:
                stop = min((at // self.shard_size + 1) * self.shard_size, indices.start)
                gaps.append(range(at, stop))
                at = stop
            at = max(at, indices.stop)
        return gaps

    @classmethod
    def from_dict(cls, content: dict[str, Any], count: int) -> PairSpec:
        """The spec of ``count`` pairs, from :meth:`to_dict` in a manifest, whose content may be arbitrary.

        Raises:
            ValueError, KeyError, TypeError: The content is not a spec. The error for a wrong field names it and its
                value.
        """
        steps = dict(content).get("steps")
        given = {} if steps is None else {"steps": tuple(steps)}
        spec = cls(**content | given | {"shape": tuple(content["shape"]), "count": count})
        for names, holds in _FIELDS.items():
            for name in names:
                if not holds(getattr(spec, name)):
                    raise ValueError(f"its {name!r} is {reprlib.repr(getattr(spec, name))}")
        return spec


def split_name(name: str) -> tuple[str, int]:
    """The digest and the count of a :attr:`PairSpec.name`.

    Raises:
        StoreError: It is not the name of pairs.
    """
    digest, _, count = name.rpartition("-")
    if not digest or not (count.isascii() and count.isdigit()):
        raise StoreError(f"{name!r} does not name pairs: a pair set's digest, '-' and the number of pairs")
    return digest, int(count)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _times(value: Any) -> bool:
    """Whether it is None or times that increase."""
    return value is None or (
        len(value) >= 2 and all(map(_number, value)) and all(a < b for a, b in itertools.pairwise(value))
    )


_FIELDS: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("model_digest", "device_class", "content"): lambda value: isinstance(value, str),
    ("conditioning",): lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
    ("guidance_scale", "rtol", "atol"): _number,
    ("shape",): lambda value: len(value) <= 8 and all(_whole(size, 1) for size in value),
    ("count", "batch_size", "shard_size"): lambda value: _whole(value, 1),
    ("seed", "format"): lambda value: _whole(value, 0),
    ("trajectory",): lambda value: isinstance(value, bool),
    ("steps",): _times,
}
"""Validity check of each field of a spec."""
