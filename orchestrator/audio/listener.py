"""What every network that listens has in common: recognisers of speech and encoders of speakers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

Self = TypeVar("Self", bound="Listener")


class Listener(ABC):
    """A frozen network that hears waves. A subclass's dataclass fields are its options; it is loaded when needed.

    What two of them hear is not comparable: the name is part of every number made with one.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the metric's column: ``wer[name]``, ``speaker_similarity[name]``."""

    def check(self) -> None:  # noqa: B027 (optional: weights may travel with the package)
        """Refuse, without loading anything large, what cannot work.

        Raises:
            ConfigError: Naming the missing package or weights, where they were looked for, and the remedy.
        """

    def to(self: Self, device: str) -> Self:
        """The listener on a device; itself where it stays on the CPU."""
        return self
