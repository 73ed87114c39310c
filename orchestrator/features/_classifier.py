"""Features from the hidden layer of a small classifier that the project trained on the real data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.content import digest
from orchestrator.features.moments import WEIGHTS
from orchestrator.weights.shipped import load_shipped

METADATA_KEY = "bespoke_features"


@dataclass
class ClassifierFeatures:
    """The hidden layer of a classifier, which a subclass names.

    Its network has two parts: ``features`` maps samples to (B, F), and ``classes`` those to scores (B, classes).

    Samples are first clipped to [-1, 1], as an image viewer would do: a value out of range looks like the nearest end.

    Attributes:
        net: The classifier, frozen.
        facts: Metadata of the weights file: test accuracy, sizes of the data sets, seed, versions.
    """

    NAME: ClassVar[str]
    DIM: ClassVar[int]
    SHAPE: ClassVar[tuple[int, ...]]
    NET: ClassVar[type[nn.Module]]
    images: ClassVar[bool] = True

    net: Any = field(init=False, repr=False)
    facts: dict[str, float | int | str] = field(init=False)

    def __post_init__(self) -> None:
        self.net, self.facts = load_shipped(self.NET(), self.file, METADATA_KEY)

    @property
    def file(self) -> Path:
        """The weights."""
        return WEIGHTS / f"{self.NAME}.safetensors"

    @property
    def content(self) -> str:
        return digest(self.NAME, self.file)

    @property
    def name(self) -> str:
        return self.NAME

    def dim(self, shape: tuple[int, ...]) -> int:
        if shape != self.SHAPE:
            raise ValueError(f"features {self.NAME!r} are of samples of shape {self.SHAPE}, got {shape}")
        return self.DIM

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, F), float32, of samples (B, \\*SHAPE) in [-1, 1]; differentiable.

        Raises:
            ValueError: The samples have another shape.
        """
        self.dim(tuple(samples.shape[1:]))
        return self.net.to(samples.device).features(samples.float().clamp(-1, 1))

    @torch.no_grad()
    def classify(self, samples: Tensor) -> Tensor:
        """The class of each sample, shape (B,), int64."""
        features = self(samples)
        return self.net.classes(features).argmax(dim=1)
