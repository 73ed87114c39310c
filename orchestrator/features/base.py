"""Interface of feature extractors. A Frechet distance is meaningless without the name of its features."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor


class FeatureExtractor(Protocol):
    """A frozen network that maps samples to the features whose distributions are compared."""

    images: ClassVar[bool]
    """Whether metrics pass decoded images in [-1, 1] to it; otherwise, samples as solved."""

    @property
    def name(self) -> str:
        """Part of the name of every metric computed with it: ``fid[name]``."""
        ...

    @property
    def content(self) -> str:
        """sha256 of everything that features depend on: options, and the content of weights."""
        ...

    def dim(self, shape: tuple[int, ...]) -> int:
        """F, the number of features of samples of this shape.

        Raises:
            ValueError: The extractor does not take such samples; the message says which it takes.
        """
        ...

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, F), float32, on the device of ``samples`` and differentiable in them.

        Args:
            samples: Shape (B, \\*sample shape), in the model's data range.
        """
        ...


def fid_column(features: str) -> str:
    """Name of a Frechet distance in tables: ``fid[digits_cnn]``."""
    return f"fid[{features}]"


def fid_metric(features: str) -> str:
    """Name of a Frechet distance in MLflow, whose metric names cannot contain brackets: ``fid/digits_cnn``."""
    return f"fid/{features}"
