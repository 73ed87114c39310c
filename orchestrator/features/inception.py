"""``inception``: the 2,048 features of the Frechet inception distance, from torch-fidelity's network."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from orchestrator.content import digest
from orchestrator.errors import ConfigError
from orchestrator.plugins import PATH

FILE = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
FEATURES = 2048


def to_uint8(images: Tensor) -> Tensor:
    """Clip and round images in [-1, 1] to 8 bits, as an image file would store them: (B, C, H, W), uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Inception:
    """InceptionV3 with the weights of the original FID (Heusel et al. 2017), as torch-fidelity distributes them.

    Attributes:
        weights: Path of the weights file; by default :data:`FILE` in torch hub's cache.

    Raises:
        ConfigError: The file does not exist. It is not downloaded.
    """

    weights: str | None = field(default=None, metadata=PATH)
    images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ConfigError(
                f"features 'inception' need {FILE}, and there is none at {self.path}; fetch it from {SOURCE}, or set "
                f"the option 'weights' to where it is"
            )

    @property
    def path(self) -> Path:
        """Path of the weights."""
        return Path(self.weights or Path(torch.hub.get_dir()) / "checkpoints" / FILE).expanduser()

    @property
    def name(self) -> str:
        return "inception"

    @property
    def content(self) -> str:
        return digest("inception", self.path)

    def dim(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"features 'inception' are of images of 1 or 3 channels, (C, H, W), got shape {shape}")
        return FEATURES

    @cached_property
    def net(self) -> Any:
        """The network.

        Raises:
            ConfigError: The file is not a weights file of this network.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
            FeatureExtractorInceptionV3,
        )

        try:
            # torch-fidelity unpickles the file without restrictions, so check first that it holds only tensors.
            torch.load(self.path, weights_only=True, map_location="cpu")
            return FeatureExtractorInceptionV3("inception", [str(FEATURES)], str(self.path))
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).split("\n", 1)[0]
            raise ConfigError(f"{self.path} holds no weights of torch-fidelity's Inception: {reason}") from error

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, (B, 2048), float32, of images (B, 1 or 3, H, W) in [-1, 1]. Rounding makes it non-differentiable.

        Raises:
            ValueError: The samples are not images of 1 or 3 channels.
        """
        self.dim(tuple(samples.shape[1:]))
        images = to_uint8(samples).expand(-1, 3, -1, -1)
        with torch.no_grad():
            (features,) = self.net.to(samples.device)(images)
        return features.float()


EXTRACTOR = Inception
