"""Common base of the networks that take sound: speech recognisers and speaker encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

Self = TypeVar("Self", bound="Listener")


class Listener(ABC):
    """A frozen network that takes waves. A subclass's dataclass fields are its options; weights load on first use.

    Results of different listeners are not comparable, so the name is part of every metric computed with one.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the metric's column: ``wer[name]``, ``speaker_similarity[name]``."""

    @property
    @abstractmethod
    def content(self) -> str:
        """sha256 of everything that what it hears depends on: options, and the content of weights."""

    def check(self) -> None:  # noqa: B027 (optional: weights may ship with the package)
        """Check that the listener can be loaded, without loading anything large.

        Raises:
            ConfigError: A package or weights are missing; the message says where they were looked for and the remedy.
        """

    def to(self: Self, device: str) -> Self:
        """Return the listener on ``device``; this default returns ``self``, which stays on the CPU."""
        return self
