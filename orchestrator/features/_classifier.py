"""Features that are the hidden layer of a small classifier, trained by the project on the real data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from orchestrator.features.moments import WEIGHTS
from orchestrator.weights.shipped import load_shipped

METADATA_KEY = "bespoke_features"


class ClassifierNet(Protocol):
    """A classifier in two parts: ``features`` (B, F) of samples, and ``classes``, the scores (B, classes) of those."""

    features: nn.Module
    classes: nn.Module

    def __call__(self, samples: Tensor) -> Tensor: ...


@dataclass
class ClassifierFeatures:
    """The hidden layer of a classifier. A subclass says which.

    Samples are clipped to [-1, 1] first, as a viewer would: what is out of range looks like what is at its end.

    Attributes:
        net: The classifier, frozen.
        facts: What the weights' file says of them: test accuracy, sizes of the sets, seed, versions.
    """

    NAME: ClassVar[str]
    DIM: ClassVar[int]
    SHAPE: ClassVar[tuple[int, ...]]
    NET: ClassVar[type[nn.Module]]

    net: Any = field(init=False, repr=False)
    facts: dict[str, float | int | str] = field(init=False)

    def __post_init__(self) -> None:
        self.net, self.facts = load_shipped(self.NET(), WEIGHTS / f"{self.NAME}.safetensors", METADATA_KEY)

    @property
    def name(self) -> str:
        return self.NAME

    @property
    def dim(self) -> int:
        return self.DIM

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, F), float32, of samples (B, \\*SHAPE) in [-1, 1]; differentiable.

        Raises:
            ValueError: Samples of another shape.
        """
        if tuple(samples.shape[1:]) != self.SHAPE:
            shape = ", ".join(map(str, self.SHAPE))
            raise ValueError(f"{self.NAME} takes samples of shape (B, {shape}), got {tuple(samples.shape)}")
        return self.net.to(samples.device).features(samples.float().clamp(-1, 1))

    @torch.no_grad()
    def classify(self, samples: Tensor) -> Tensor:
        """The class of each sample, shape (B,), int64."""
        features = self(samples)
        return self.net.classes(features).argmax(dim=1)
