"""``digits``: English digits, recognised by a small network that the project trained on real recordings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.audio.mel import MELS, RATE, FloatArray, audible, log_mel, resampled
from orchestrator.audio.recognisers.base import Recogniser
from orchestrator.content import digest
from orchestrator.weights.shipped import load_shipped

WEIGHTS = Path(__file__).parent.parent / "weights" / "digits_recogniser.safetensors"
METADATA_KEY = "bespoke_recogniser"
BLANK = 10
"""The blank class of connectionist temporal classification (CTC; Graves et al. 2006)."""
STRIDE = 2
"""Frames per output step."""
WIDTH = 128
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the digits."""


class DigitsNet(nn.Module):
    """Convolutions over time; the scores of a step depend on about a third of a second around it."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inward: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv1d(inward, WIDTH, 5, stride, padding=2, bias=False)
            return [convolution, nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.15)]

        self.net = nn.Sequential(
            *stage(MELS), *stage(WIDTH, STRIDE), *stage(WIDTH), *stage(WIDTH), *stage(WIDTH), nn.Conv1d(WIDTH, 11, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Log probabilities of the digits and of :data:`BLANK`, (steps, B, 11), the layout that CTC expects.

        Args:
            features: Normalised log-mel amplitudes, (B, MELS, frames), float32.
        """
        return self.net(features).permute(2, 0, 1).log_softmax(dim=2)

    @torch.no_grad()
    def strings(self, features: Tensor) -> list[list[int]]:
        """The likeliest digits of each sample, after merging repeated classes and dropping blanks."""
        best = self(features).argmax(dim=2).T.tolist()
        return [[digit for digit, _ in itertools.groupby(steps) if digit != BLANK] for steps in best]


@cache
def recogniser() -> tuple[DigitsNet, dict[str, Any]]:
    """The shipped recogniser, frozen, and the facts in its file's metadata."""
    return load_shipped(DigitsNet(), WEIGHTS, METADATA_KEY)


def understood(waves: Sequence[FloatArray]) -> list[list[int]]:
    """Digits recognised in waves at :data:`orchestrator.audio.mel.RATE`, one list per wave."""
    net, _ = recogniser()
    return [net.strings(torch.from_numpy(log_mel(wave))[None])[0] for wave in waves]


@dataclass(frozen=True)
class Digits(Recogniser):
    """The project's own recogniser of spoken English digits only; its weights ship with the package."""

    @property
    def content(self) -> str:
        return digest(WEIGHTS)

    @property
    def name(self) -> str:
        return "digits"

    def transcribe(self, waves: Sequence[FloatArray], rate: int) -> list[str]:
        heard = [understood([resampled(wave, rate, RATE)])[0] if audible(wave) else [] for wave in waves]
        return [" ".join(WORDS[digit] for digit in digits) for digits in heard]


RECOGNISER = Digits
