"""What a speaker encoder is: a frozen network that maps sound to a direction that is the voice's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from orchestrator.audio import FloatArray


class SpeakerEncoder(ABC):
    """Voices as vectors of length 1. A subclass's dataclass fields are its options; its network is loaded when needed.

    Similarities in two encoders' terms are not comparable: the encoder's name is part of every number made with it.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the metric's column: ``speaker_similarity[name]``."""

    def check(self) -> None:  # noqa: B027 (optional: weights may travel with the package)
        """Refuse, without loading anything large, what cannot work.

        Raises:
            ConfigError: Naming the missing package or weights, where they were looked for, and the remedy.
        """

    def to(self, device: str) -> SpeakerEncoder:
        """The encoder on a device; itself where it stays on the CPU."""
        return self

    @abstractmethod
    def embed(self, waves: Sequence[FloatArray], rate: int) -> Tensor:
        """The voice of each wave, shape (B, D), float32 on the CPU, of Euclidean length 1; each as if it were alone.

        A wave in which nothing can be heard (empty, silent, or with a value that is not finite) has NaN for a voice:
        nobody's, and never averaged away.

        Args:
            waves: One-dimensional, float32, nominally in [-1, 1].
            rate: Their samples a second.
        """
