"""Log-mel spectrograms of sound, on which the zoo's audio models are trained, and a vocoder for their samples.

Needs the extra ``audio`` (librosa). Independent of models and data sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import ConfigError

RATE = 8000
"""Samples per second."""
HOP = 128
"""Samples from one frame to the next: 16 ms."""
WINDOW = 512
MELS = 40
FLOOR = 1e-4
"""Smallest mel amplitude; anything below it counts as silence."""
CENTRE, SPREAD = -4.3, 1.9
"""Natural-log amplitudes are normalised by these to a mean near 0 and a standard deviation near 1."""
SILENCE = float((np.log(FLOOR) - CENTRE) / SPREAD)
"""The normalised value of a silent bin."""
LOUDEST = 3.0
"""Upper bound of the recordings' normalised values."""
GRIFFIN_LIM_ITERATIONS = 60

FloatArray = npt.NDArray[np.float32]


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise ConfigError("audio needs librosa; install it: pip install 'bespoke-solvers[audio]'") from error
    return librosa


def log_mel(wave: FloatArray) -> FloatArray:
    """Normalised log-mel amplitudes, shape (MELS, frames), of a wave of shape (samples,) at :data:`RATE`.

    The wave is first scaled to a peak of 1, since the loudness of a recording is arbitrary.
    """
    librosa = _librosa()
    peak = float(np.abs(wave).max())
    amplitudes = librosa.feature.melspectrogram(
        y=wave / max(peak, 1e-8), sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS, power=1.0
    )
    normalised: FloatArray = ((np.log(np.maximum(amplitudes, FLOOR)) - CENTRE) / SPREAD).astype(np.float32)
    return normalised


def vocode(features: FloatArray) -> FloatArray:
    """Reconstruct a wave, shape ((frames - 1) * HOP,), from log-mel amplitudes, shape (MELS, frames), by Griffin-Lim.

    The initial phase is fixed, so equal features give equal waves. Bins within a factor of 2 of :data:`FLOOR` are
    silenced.
    """
    librosa = _librosa()
    logs = features.astype(np.float64) * SPREAD + CENTRE
    amplitudes = np.where(logs > np.log(2 * FLOOR), np.exp(np.minimum(logs, 6.0)), 0.0).astype(np.float32)
    spectrum = librosa.feature.inverse.mel_to_stft(amplitudes, sr=RATE, n_fft=WINDOW, power=1.0)
    wave: FloatArray = librosa.griffinlim(
        spectrum,
        n_iter=GRIFFIN_LIM_ITERATIONS,
        hop_length=HOP,
        n_fft=WINDOW,
        random_state=0,
        length=(features.shape[1] - 1) * HOP,
    )
    return wave


def resampled(wave: FloatArray, rate: int, wanted: int) -> FloatArray:
    """Resample a wave of shape (samples,), float32, from ``rate`` to ``wanted``; unchanged if the two are equal."""
    if rate == wanted:
        return wave
    converted: FloatArray = _librosa().resample(wave, orig_sr=rate, target_sr=wanted).astype(np.float32)
    return converted


def audible(wave: FloatArray) -> bool:
    """Whether the wave has any sound: at least one sample, all samples finite, not all of them 0."""
    return wave.size > 0 and bool(np.isfinite(wave).all()) and float(np.abs(wave).max()) > 0
