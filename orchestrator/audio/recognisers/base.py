"""What a recogniser of speech is: from sound to the words understood."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

from orchestrator.audio.listener import Listener
from orchestrator.audio.mel import FloatArray


class Recogniser(Listener):
    """Understands words."""

    @abstractmethod
    def transcribe(self, waves: Sequence[FloatArray], rate: int) -> list[str]:
        """What is understood of each wave, each as if it were alone; "" where there is nothing to be heard.

        Args:
            waves: One-dimensional, float32, finite, nominally in [-1, 1].
            rate: Their samples a second.
        """

    def words(self, text: str) -> list[str]:
        """The words of a text, said or heard, so that only what is spoken differs: small letters, no punctuation."""
        return re.sub(r"[^\w\s']|_", " ", text.lower()).split()
