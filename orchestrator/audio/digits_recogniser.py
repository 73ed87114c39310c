"""A recogniser of strings of spoken digits, trained by the project on real recordings.

:func:`understood` takes waves and returns digits. The weights ship with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.audio.mel import MELS, FloatArray, log_mel
from orchestrator.weights.shipped import load_shipped

WEIGHTS = Path(__file__).parent / "weights" / "digits_recogniser.safetensors"
METADATA_KEY = "bespoke_recogniser"
BLANK = 10
"""The blank class of connectionist temporal classification (CTC; Graves et al. 2006)."""
STRIDE = 2
"""Frames per output step."""
WIDTH = 128
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the digits."""


class Recogniser(nn.Module):
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
def recogniser() -> tuple[Recogniser, dict[str, Any]]:
    """The shipped recogniser, frozen, and the facts in its file's metadata."""
    return load_shipped(Recogniser(), WEIGHTS, METADATA_KEY)


def understood(waves: Sequence[FloatArray]) -> list[list[int]]:
    """Digits recognised in waves at :data:`orchestrator.audio.mel.RATE`, one list per wave."""
    net, _ = recogniser()
    return [net.strings(torch.from_numpy(log_mel(wave))[None])[0] for wave in waves]


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
