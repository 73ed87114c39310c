"""``digits_cnn``: features of 8x8 digits, from a small classifier that the project trained on the real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from safetensors import safe_open
from torch import Tensor, nn

from orchestrator.models.base import freeze
from orchestrator.moments import WEIGHTS

METADATA_KEY = "bespoke_features"
NAME = "digits_cnn"
FEATURES = 64


class DigitsNet(nn.Module):
    """Two convolution stages and a hidden layer: the hidden layer's activations are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * 2 * 2, FEATURES),
            nn.GELU(),
        )
        self.classes = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, 10))

    def forward(self, samples: Tensor) -> Tensor:
        """Class scores, shape (B, 10), of samples of shape (B, 1, 8, 8)."""
        return self.classes(self.features(samples))


@dataclass
class DigitsCNN:
    """64 features of a digit: the hidden layer of a classifier (test accuracy in ``facts``).

    Samples are clipped to [-1, 1] first, as a viewer would: what is out of range looks like what is at its end.

    Attributes:
        net: The classifier, frozen.
        facts: What the weights' file says of them: test accuracy, sizes of the sets, seed, versions.
    """

    net: DigitsNet = field(init=False, repr=False)
    facts: dict[str, float | int | str] = field(init=False)

    def __post_init__(self) -> None:
        with safe_open(WEIGHTS / f"{NAME}.safetensors", framework="pt") as file:
            self.facts = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.net = DigitsNet()
        self.net.load_state_dict(tensors)
        freeze(self.net)

    @property
    def name(self) -> str:
        return NAME

    @property
    def dim(self) -> int:
        return FEATURES

    def __call__(self, samples: Tensor) -> Tensor:
        """Features, shape (B, 64), float32, of samples of shape (B, 1, 8, 8) in [-1, 1]; differentiable.

        Raises:
            ValueError: Samples of another shape.
        """
        if samples.shape[1:] != (1, 8, 8):
            raise ValueError(f"{NAME} takes samples of shape (B, 1, 8, 8), got {tuple(samples.shape)}")
        return self.net.to(samples.device).features(samples.float().clamp(-1, 1))


EXTRACTOR = DigitsCNN
