"""``digits``: English digits, recognised by a small network that the project trained on real recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.audio.digits_recogniser import WORDS, understood
from orchestrator.audio.mel import RATE, FloatArray, audible, resampled
from orchestrator.audio.recognisers.base import Recogniser


@dataclass(frozen=True)
class Digits(Recogniser):
    """The project's own recogniser of spoken English digits only; its weights ship with the package."""

    @property
    def name(self) -> str:
        return "digits"

    def transcribe(self, waves: Sequence[FloatArray], rate: int) -> list[str]:
        heard = [understood([resampled(wave, rate, RATE)])[0] if audible(wave) else [] for wave in waves]
        return [" ".join(WORDS[digit] for digit in digits) for digits in heard]


RECOGNISER = Digits
