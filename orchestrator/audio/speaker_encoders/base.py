"""What a speaker encoder is: a frozen network that maps sound to a direction that is the voice's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from orchestrator.audio.listener import Listener
from orchestrator.audio.mel import FloatArray


class SpeakerEncoder(Listener):
    """Voices as vectors of length 1."""

    @abstractmethod
    def embed(self, waves: Sequence[FloatArray], rate: int) -> Tensor:
        """The voice of each wave, shape (B, D), float32 on the CPU, of Euclidean length 1; each as if it were alone.

        A wave in which nothing can be heard (empty, silent, or with a value that is not finite) has NaN for a voice:
        nobody's, and never averaged away.

        Args:
            waves: One-dimensional, float32, nominally in [-1, 1].
            rate: Their samples a second.
        """
