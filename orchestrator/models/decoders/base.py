"""What a decoder is: a frozen network from latents to images or sound. Plays no part in velocities or in digests."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Decoder(ABC):
    """Turns a model's samples into what people perceive. A subclass's dataclass fields are its options."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """Images in [-1, 1], (B, C, H, W), or sound, (B, channels, samples); float32.

        Args:
            samples: Latents as the model samples them, (B, \\*shape).
        """
