"""What a feature extractor is. A Frechet distance means nothing without the name of the features it is taken in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FeatureExtractor(Protocol):
    """A frozen network that maps samples to the features whose distribution is compared."""

    @property
    def name(self) -> str:
        """Part of every number that is made with it: ``fid[name]``."""
        ...

    @property
    def dim(self) -> int:
        """F, the number of features."""
        ...

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, F), float32, on the device of ``samples`` and differentiable in them.

        Args:
            samples: Shape (B, \\*sample shape), in the model's data range.
        """
        ...


def fid_column(features: str) -> str:
    """Name of a Frechet distance in tables and in MLflow: ``fid[digits_cnn]``."""
    return f"fid[{features}]"


def fid_metric(features: str) -> str:
    """The same as MLflow takes it, which knows no brackets: ``fid/digits_cnn``."""
    return f"fid/{features}"
