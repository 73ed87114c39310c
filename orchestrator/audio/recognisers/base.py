"""Interface of speech recognisers, which turn sound into words, and their error rate."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Hashable, Sequence

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


def word_errors(said: Sequence[Hashable], heard: Sequence[Hashable]) -> int:
    """Levenshtein distance: the fewest word insertions, deletions and substitutions between the two strings."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def word_error_rate(said: Sequence[Sequence[Hashable]], heard: Sequence[Sequence[Hashable]]) -> float:
    """Word errors of all strings, divided by the number of words said.

    Raises:
        ValueError: ``said`` contains no words.
    """
    words = sum(len(string) for string in said)
    if not words:
        raise ValueError("a word error rate needs at least one word that was said")
    return sum(word_errors(a, b) for a, b in zip(said, heard, strict=True)) / words
