"""Interface of speaker encoders: frozen networks that map sound to a unit vector identifying the voice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from orchestrator.audio.listener import Listener
from orchestrator.audio.mel import FloatArray


class SpeakerEncoder(Listener):
    """A listener that embeds voices as vectors of length 1."""

    @abstractmethod
    def embed(self, waves: Sequence[FloatArray], rate: int) -> Tensor:
        """Embed each wave independently of the others: shape (B, D), float32 on the CPU, of Euclidean length 1.

        A wave without sound (empty, silent, or with a value that is not finite) gets NaN, which an average cannot
        hide.

        Args:
            waves: One-dimensional, float32, nominally in [-1, 1].
            rate: Their samples per second.
        """
