"""``digits_cnn``: features of 8x8 digits, from a small classifier that the project trained on the real data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from orchestrator.features._classifier import ClassifierFeatures

FEATURES = 64


class DigitsNet(nn.Module):
    """Two convolution stages and a hidden layer whose activations are the features."""

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
class DigitsCNN(ClassifierFeatures):
    """64 features per digit, from the hidden layer of a digits classifier."""

    NAME, DIM, SHAPE, NET = "digits_cnn", FEATURES, (1, 8, 8), DigitsNet


EXTRACTOR = DigitsCNN
