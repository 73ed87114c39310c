"""``cifar10_gray16_cnn``: features of grey 16x16 photographs, from the project's own classifier of CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from orchestrator.features._classifier import ClassifierFeatures

FEATURES = 128


def _convolution(inward: int, outward: int) -> list[nn.Module]:
    return [nn.Conv2d(inward, outward, 3, padding=1, bias=False), nn.BatchNorm2d(outward), nn.GELU()]


class PhotosNet(nn.Module):
    """Three convolution stages, an average over pixels, and a hidden layer whose activations are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 96),
            *_convolution(96, 96),
            nn.MaxPool2d(2),
            *_convolution(96, 192),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, FEATURES),
            nn.GELU(),
        )
        self.classes = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, 10))

    def forward(self, samples: Tensor) -> Tensor:
        """Class scores, shape (B, 10), of samples of shape (B, 1, 16, 16)."""
        return self.classes(self.features(samples))


@dataclass
class Cifar10Gray16CNN(ClassifierFeatures):
    """128 features per photograph, from the hidden layer of a CIFAR-10 classifier."""

    NAME, DIM, SHAPE, NET = "cifar10_gray16_cnn", FEATURES, (1, 16, 16), PhotosNet


EXTRACTOR = Cifar10Gray16CNN
