"""What a recogniser of speech is: from sound to the words understood."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from orchestrator.audio import FloatArray


class Recogniser(ABC):
    """Understands words. A subclass's dataclass fields are its options; its network is loaded when needed.

    Word error rates of two recognisers are not comparable: its name is part of every number made with it.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the metric's column: ``wer[name]``."""

    def check(self) -> None:  # noqa: B027 (optional: weights may travel with the package)
        """Refuse, without loading anything large, what cannot work.

        Raises:
            ConfigError: Naming the missing package or weights, where they were looked for, and the remedy.
        """

    def to(self, device: str) -> Recogniser:
        """The recogniser on a device; itself where it stays on the CPU."""
        return self

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
