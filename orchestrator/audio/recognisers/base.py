"""Interface of speech recognisers, which turn sound into words."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

from orchestrator.audio.listener import Listener
from orchestrator.audio.mel import FloatArray


class Recogniser(Listener):
    """A listener that transcribes speech."""

    @abstractmethod
    def transcribe(self, waves: Sequence[FloatArray], rate: int) -> list[str]:
        """Transcribe each wave independently of the others; "" for a wave without sound.

        Args:
            waves: One-dimensional, float32, finite, nominally in [-1, 1].
            rate: Their samples per second.
        """

    def words(self, text: str) -> list[str]:
        """Split a reference or transcribed text into words to be compared: lower case, without punctuation."""
        return re.sub(r"[^\w\s']|_", " ", text.lower()).split()
