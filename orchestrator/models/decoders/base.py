"""Interface of decoders: frozen networks from latents to images or sound. They do not affect velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Decoder(ABC):
    """Base class of decoders from latents to images or sound. The dataclass fields of a subclass are its options."""

    @property
    @abstractmethod
    def content(self) -> str:
        """sha256 of everything that decoded samples depend on; part of the model's digest."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """Return images in [-1, 1], (B, C, H, W), or sound, (B, channels, samples), in float32.

        Args:
            samples: Latents sampled by the model, (B, \\*shape).
        """
