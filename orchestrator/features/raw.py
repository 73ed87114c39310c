"""``raw``: the values of a sample themselves, for kinds of samples that no network was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from orchestrator.content import digest


@dataclass(frozen=True)
class Raw:
    """The values of a sample as solved, flattened: one feature per value, of samples of any shape."""

    name = "raw"
    content = digest("raw")
    images: ClassVar[bool] = False

    def dim(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, (B, F), float32, of samples (B, \\*shape); differentiable."""
        return samples.flatten(1).float()


EXTRACTOR = Raw
