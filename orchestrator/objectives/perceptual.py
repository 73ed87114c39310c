"""Perceptual loss: the distance between the features of a sample and those of the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from orchestrator import plugins
from orchestrator.content import digest
from orchestrator.features.base import FeatureExtractor
from orchestrator.objectives.base import SolverObjective
from orchestrator.pairs import PairSet
from orchestrator.plugins import options_of
from solvers.field import VelocityField
from solvers.losses import psnr_loss
from solvers.ns import NSSolver


@dataclass(frozen=True)
class PerceptualObjective(SolverObjective):
    """log ||phi(x_n) - phi(x(1))||^2 for the features phi of a chosen network.

    DDSS (Watson et al. 2022) and LD3 (Tong et al. 2024) minimise related losses: DDSS a kernel distance between
    feature distributions, LD3 LPIPS, which is a squared distance between features (``features: lpips``).

    Attributes:
        features: Feature extractor plugin.
        options: Its options.
    """

    features: str = "digits_cnn"
    options: dict[str, Any] = field(default_factory=dict, metadata=options_of("features", "features"))
    source = "Watson et al. 2022 (DDSS), Tong et al. 2024 (LD3), here per pair"

    def __post_init__(self) -> None:
        _ = self.extractor  # runs its own checks before any work

    @property
    def label(self) -> str:
        return f"perceptual, {self.features}"

    @cached_property
    def extractor(self) -> FeatureExtractor:
        return plugins.build("features", self.features, self.options)

    @property
    def content(self) -> str:
        return digest(self.features, self.extractor.content)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        self.extractor.dim(shape)

    def per_sample(self, solver: NSSolver, field: VelocityField, pairs: PairSet) -> Tensor:
        samples = pairs.filled(solver.sample(field, pairs.x0))
        return psnr_loss(self.extractor(samples), self.extractor(pairs.x1))


OBJECTIVE = PerceptualObjective
