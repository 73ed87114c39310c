"""Spectrograms of waves of any sample rate, to be looked at. Needs torch only."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

BANDS, FRAMES = 64, 240
"""Most frequencies and frames of a spectrogram."""
WINDOW = 0.032
"""Length of a window in seconds, rounded to a power of two of samples."""
QUIETEST = -80.0
"""Level of silence in dB below a full-scale sine."""


def spectrogram(waves: Tensor, rate: int) -> Tensor:
    """Level of the loudest frequency of each band in dB, (N, bands, frames), float32, low frequencies first.

    Bands are equally wide on the mel scale, unless a window cannot resolve so many low frequencies.

    Args:
        waves: Waves in [-1, 1], (N, samples).
        rate: Samples per second.
    """
    size = 2 ** max(4, round(WINDOW * rate - 1).bit_length())
    hop = max(size // 4, -(-waves.shape[1] // FRAMES))
    padded = torch.nn.functional.pad(waves.float(), (0, max(0, size - waves.shape[1])))
    window = torch.hann_window(size, device=waves.device)
    spectrum = torch.stft(padded, size, hop, window=window, center=False, return_complex=True).abs()
    highest = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700))
    ends = 700 * (10 ** (torch.linspace(0, 1, BANDS + 1) * highest / 2595) - 1)
    bins = (ends / rate * (size + 2)).round().long().unique().tolist()
    loudest = [spectrum[:, first:end].amax(dim=1) for first, end in itertools.pairwise(bins)]
    levels = 20 * torch.log10(torch.stack(loudest, dim=1) / (window.sum() / 2) + 1e-12)
    return levels.clamp(min=QUIETEST)
