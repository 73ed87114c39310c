"""LPIPS of images against ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from orchestrator.datasets.base import Dataset
from orchestrator.features.lpips import LPIPS, Trunk
from orchestrator.metrics.base import PairMetric, check_comparable
from orchestrator.plugins import PATH


@dataclass(frozen=True)
class LPIPSMetric(PairMetric):
    """LPIPS per image (Zhang et al. 2018), after decoding and clipping to [-1, 1].

    Attributes:
        trunk: 'alex', 'vgg' or 'squeeze'; part of the metric's name.
        weights: Path of torchvision's weights of the trunk; by default in torch hub's cache.
    """

    trunk: Trunk = "alex"
    weights: str | None = field(default=None, metadata=PATH)

    higher_is_better: ClassVar[bool] = False
    sees = "images"

    @property
    def column(self) -> str:
        return f"lpips[{self.trunk}]"

    @cached_property
    def extractor(self) -> LPIPS:
        """The features whose squared distance is LPIPS."""
        return LPIPS(self.trunk, self.weights)

    def depends_on(self) -> Iterable[Any]:
        return (self.extractor.content,)

    def check(self, dataset: Dataset) -> None:
        _ = self.extractor

    def check_samples(self, shape: tuple[int, ...], count: int) -> None:
        self.extractor.check_shape(shape)

    def per_sample(self, samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
        check_comparable(samples, reference)
        mine, theirs = (self.extractor(images.clamp(-1, 1)) for images in (samples, reference))
        return (mine - theirs).double().square().sum(dim=1)


METRIC = LPIPSMetric
