"""``digits_speakers``: a small network of the project that distinguishes the six speakers of the spoken digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.audio.mel import MELS, RATE, FloatArray, audible, log_mel, resampled
from orchestrator.audio.speaker_encoders.base import SpeakerEncoder
from orchestrator.content import digest
from orchestrator.weights.shipped import load_shipped

WEIGHTS = Path(__file__).parent / "weights" / "digits_speakers.safetensors"
METADATA_KEY = "bespoke_speaker_encoder"
SPEAKERS = 6
WIDTH = 96
DIM = 64


class SpeakerNet(nn.Module):
    """Convolutions over time, then mean and deviation over all frames (Snyder et al. 2018), then a unit vector."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inward: int, dilation: int = 1) -> list[nn.Module]:
            convolution = nn.Conv1d(inward, WIDTH, 5, padding=2 * dilation, dilation=dilation, bias=False)
            return [convolution, nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.1)]

        self.frames = nn.Sequential(*stage(MELS), *stage(WIDTH), *stage(WIDTH, 2), *stage(WIDTH))
        self.voice = nn.Linear(2 * WIDTH, DIM)
        self.speakers = nn.Linear(DIM, SPEAKERS, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Unit vectors, (B, DIM), of normalised log-mel amplitudes, (B, MELS, frames), float32."""
        frames = self.frames(features)
        pooled = torch.cat([frames.mean(dim=2), (frames.var(dim=2, correction=0) + 1e-5).sqrt()], dim=1)
        return nn.functional.normalize(self.voice(pooled), dim=1)

    def cosines(self, directions: Tensor) -> Tensor:
        """Cosine of each direction to each speaker's, (B, SPEAKERS)."""
        return directions @ nn.functional.normalize(self.speakers.weight, dim=1).T


@cache
def encoder() -> tuple[SpeakerNet, dict[str, Any]]:
    """The shipped network, frozen, and the facts in its file's metadata."""
    return load_shipped(SpeakerNet(), WEIGHTS, METADATA_KEY)


@dataclass(frozen=True)
class DigitsSpeakers(SpeakerEncoder):
    """A small encoder trained on the six speakers of the spoken digits, and valid for those only.

    Trained by the project on recordings, vocoded and not, of the training split; its weights ship with the package.
    The test recordings come from the sessions it was trained on, so rooms and microphones may identify a speaker as
    much as the voice does; its perfect score on the test split shows no more than that. For any other voice it only
    says which of the six is nearest, which measures nothing.
    """

    @property
    def content(self) -> str:
        return digest(WEIGHTS)

    @property
    def name(self) -> str:
        return "digits_speakers"

    def embed(self, waves: Sequence[FloatArray], rate: int) -> Tensor:
        net, _ = encoder()
        voices = torch.full((len(waves), DIM), torch.nan)
        with torch.no_grad():
            for voice, wave in zip(voices, waves, strict=True):
                if audible(wave):
                    voice[:] = net(torch.from_numpy(log_mel(resampled(wave, rate, RATE)))[None])[0]
        return voices


ENCODER = DigitsSpeakers
