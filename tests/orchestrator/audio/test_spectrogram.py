"""Spectrograms that are looked at: level, frequency and time of a tone, at any sample rate."""

from __future__ import annotations

import pytest
import torch

from orchestrator.audio.spectrogram import BANDS, FRAMES, QUIETEST, spectrogram


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100])
def test_a_tone_is_where_and_when_it_sounds(rate: int) -> None:
    """Half a second of silence, then a full-scale tone at a quarter of the rate: 0 dB, in the upper half of bands."""
    time = torch.arange(rate) / rate
    wave = torch.where(time < 0.5, 0.0, torch.sin(2 * torch.pi * rate / 4 * time))
    levels = spectrogram(wave[None], rate)[0]
    bands, frames = levels.shape
    assert 32 < bands <= BANDS
    assert 20 < frames <= FRAMES
    assert levels[:, : frames // 2 - 2].max() == QUIETEST
    loudest = levels[:, frames // 2 + 2 :].amax(dim=1)
    assert loudest.max() == pytest.approx(0, abs=3)
    assert bands / 2 < int(loudest.argmax()) < bands - 1


def test_a_wave_shorter_than_a_window_has_a_frame() -> None:
    """It is padded with silence."""
    assert spectrogram(torch.ones(2, 5), 8000).shape[2] == 1
