"""``lpips``: the features whose squared distance is LPIPS (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from orchestrator.content import digest
from orchestrator.errors import ConfigError
from orchestrator.plugins import PATH
from orchestrator.weights.frozen import freeze

Trunk = Literal["alex", "vgg", "squeeze"]

FILES: dict[str, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""File names of the trunks' ImageNet weights, as torchvision downloads them."""


@dataclass(frozen=True)
class LPIPS:
    """LPIPS as one vector per sample: the sum of squared differences of two vectors is their LPIPS.

    The calibrated layer weights come with the package ``lpips`` (the extra ``perceptual``). The trunk's ImageNet
    weights are torchvision's file, by default in torch hub's cache. Samples lie in [-1, 1] and have one or three
    channels and at least 32 pixels per side.

    Attributes:
        trunk: 'alex', 'vgg' or 'squeeze'.
        weights: Path of torchvision's weights of the trunk; by default in torch hub's cache.

    Raises:
        ConfigError: The package or the weights are missing.
        ValueError: Unknown trunk.
    """

    trunk: Trunk = "alex"
    weights: str | None = field(default=None, metadata=PATH)
    images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.trunk not in get_args(Trunk):
            raise ValueError(f"trunk must be one of {', '.join(get_args(Trunk))}, got {self.trunk!r}")
        if importlib.util.find_spec("lpips") is None:
            raise ConfigError(
                "features 'lpips' need the package lpips; install it: pip install 'bespoke-solvers[perceptual]'"
            )
        if not self.file.is_file():
            raise ConfigError(
                f"features 'lpips' need torchvision's {self.trunk} weights, and {self.file} is not there; download "
                f"{FILES[self.trunk]} from the torchvision model zoo, or say where it is with the option 'weights'"
            )

    @property
    def file(self) -> Path:
        """Path of the trunk's weights."""
        return Path(self.weights) if self.weights else Path(torch.hub.get_dir()) / "checkpoints" / FILES[self.trunk]

    @property
    def name(self) -> str:
        return f"lpips_{self.trunk}"

    @property
    def content(self) -> str:
        package = importlib.util.find_spec("lpips")
        assert package is not None
        assert package.origin is not None
        return digest(self.trunk, self.file, Path(package.origin).parent / "weights" / "v0.1" / f"{self.trunk}.pth")

    def dim(self, shape: tuple[int, ...]) -> int:
        self.check_shape(shape)
        return self(torch.zeros(1, *shape)).shape[1]

    @staticmethod
    def check_shape(shape: tuple[int, ...]) -> None:
        """Refuse samples of a shape that no trunk takes.

        Raises:
            ValueError: The message has the shape.
        """
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 32:
            raise ValueError(
                f"LPIPS is of images of 1 or 3 channels and at least 32 x 32 pixels, (C, H, W), got shape {shape}"
            )

    @cached_property
    def net(self) -> Any:
        import lpips  # type: ignore[import-untyped]  # an extra, and slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision warns about arguments that lpips passes
            net = lpips.LPIPS(net=self.trunk, pnet_rand=True, verbose=False)
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        # lpips slices the trunk at the layers it compares, and keeps torchvision's layer numbers within the slices.
        expected = net.net.state_dict()
        tensors = {
            key: state[f"features.{key.split('.', 1)[1]}"]
            for key in expected
            if f"features.{key.split('.', 1)[1]}" in state
        }
        if len(tensors) != len(expected):
            raise ConfigError(
                f"{self.file} holds no torchvision weights of {self.trunk}: {len(expected) - len(tensors)} of "
                f"{len(expected)} tensors are missing; download {FILES[self.trunk]} again"
            )
        net.net.load_state_dict(tensors)
        return freeze(net)

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, F), of samples of shape (B, 3 or 1, H, W) in [-1, 1]; differentiable.

        Raises:
            ValueError: The samples have another shape.
        """
        self.check_shape(tuple(samples.shape[1:]))
        net = self.net.to(samples.device)
        maps = net.net(net.scaling_layer(samples.float().expand(-1, 3, -1, -1)))
        layers = []
        for layer, features in enumerate(maps):
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            weight = net.lins[layer].model[-1].weight.clamp_min(0).sqrt()
            layers.append((weight * unit / (features.shape[2] * features.shape[3]) ** 0.5).flatten(1))
        return torch.cat(layers, dim=1)


EXTRACTOR = LPIPS
