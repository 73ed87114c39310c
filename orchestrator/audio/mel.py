"""Sound to log-mel spectrograms and back: what audio models of the zoo are trained on, and how they are listened to.

Needs the extra ``audio`` (librosa). Knows nothing of models or data sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import ConfigError

RATE = 8000
"""Samples a second."""
HOP = 128
"""Samples from one frame to the next: 16 ms."""
WINDOW = 512
MELS = 40
FLOOR = 1e-4
"""Smallest mel amplitude: below it is silence."""
CENTRE, SPREAD = -4.3, 1.9
"""Log amplitudes are normalised by these to a mean near 0 and a deviation near 1 (natural logarithms)."""
SILENCE = float((np.log(FLOOR) - CENTRE) / SPREAD)
"""The normalised value of a silent bin."""
LOUDEST = 3.0
"""No normalised value of the recordings is above it."""
GRIFFIN_LIM_ITERATIONS = 60

FloatArray = npt.NDArray[np.float32]


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise ConfigError("sound needs librosa; pip install 'bespoke-solvers[audio]'") from error
    return librosa


def log_mel(wave: FloatArray) -> FloatArray:
    """Normalised log-mel amplitudes, shape (MELS, frames), of a wave of shape (samples,) at :data:`RATE`.

    The wave is brought to a peak of 1 first: recordings differ in loudness by chance.
    """
    librosa = _librosa()
    peak = float(np.abs(wave).max())
    amplitudes = librosa.feature.melspectrogram(
        y=wave / max(peak, 1e-8), sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS, power=1.0
    )
    normalised: FloatArray = ((np.log(np.maximum(amplitudes, FLOOR)) - CENTRE) / SPREAD).astype(np.float32)
    return normalised


def vocode(features: FloatArray) -> FloatArray:
    """A wave, shape ((frames - 1) * HOP,), whose log-mel amplitudes are near these, shape (MELS, frames): Griffin-Lim.

    The phase begins the same each time, so equal features sound equal. Bins that are as good as silent are silent.
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
    """A wave of shape (samples,) at another rate, float32; itself where the rates agree."""
    if rate == wanted:
        return wave
    found: FloatArray = _librosa().resample(wave, orig_sr=rate, target_sr=wanted).astype(np.float32)
    return found


def audible(wave: FloatArray) -> bool:
    """Whether there is anything to hear: some sample, all of them finite, not all of them 0."""
    return wave.size > 0 and bool(np.isfinite(wave).all()) and float(np.abs(wave).max()) > 0
