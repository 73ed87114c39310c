"""Mel features of audio, vocoding back to sound, and the digits recogniser with its word error rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.audio.mel import HOP, MELS, RATE, SILENCE, WINDOW, log_mel, vocode
from orchestrator.audio.recognisers.base import word_error_rate, word_errors
from orchestrator.audio.recognisers.digits import recogniser, understood
from orchestrator.datasets.spoken_digits import SpokenDigits


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def test_log_mel_does_not_depend_on_loudness() -> None:
    """Recordings are normalised to the same peak."""
    np.testing.assert_allclose(log_mel(0.01 * tone(440)), log_mel(tone(440)), atol=1e-3)


def test_a_higher_tone_is_in_a_higher_bin() -> None:
    """Bins are ordered by frequency and frames by time."""
    assert [int(log_mel(tone(hertz)).mean(axis=1).argmax()) for hertz in (200, 800, 3000)] == sorted(
        int(log_mel(tone(hertz)).mean(axis=1).argmax()) for hertz in (3000, 200, 800)
    )
    late = np.concatenate([np.zeros(RATE // 2, dtype=np.float32), tone(440)])
    loud = log_mel(late).max(axis=0)
    assert loud[: len(loud) // 2 - WINDOW // HOP].max() == pytest.approx(SILENCE)
    assert loud[len(loud) // 2 + WINDOW // HOP :].min() > 0


@pytest.mark.parametrize("hertz", [250, 700, 2000])
def test_vocoding_keeps_the_frequency_of_a_tone(hertz: float) -> None:
    """The loudest frequency stays within a mel bin, the length is that of the frames, and vocoding is deterministic."""
    features = log_mel(tone(hertz))
    wave = vocode(features)
    assert features.shape[0] == MELS
    assert wave.shape == ((features.shape[1] - 1) * HOP,)
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.fft.rfftfreq(len(wave), 1 / RATE)[spectrum.argmax()] == pytest.approx(hertz, rel=0.1)
    np.testing.assert_array_equal(vocode(features), wave)


def test_silence_is_vocoded_to_silence() -> None:
    """Vocoding adds no hiss to silent frames."""
    assert np.abs(vocode(np.full((MELS, 20), SILENCE, dtype=np.float32))).max() < 1e-6


def test_the_recogniser_understands_vocoded_recordings() -> None:
    """On recordings outside the training set, the word error rate is that in the weights file, to within 0.03."""
    dataset = SpokenDigits()
    plans = dataset.conditions(5, range(30))
    digits = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    heard = understood([vocode(features) for features in dataset.real(plans).numpy()])
    _, facts = recogniser()
    assert word_error_rate(digits, heard) <= facts["test_wer_vocoded"] + 0.03
    assert facts["test_wer_vocoded"] < 0.05


def test_the_recogniser_hears_few_digits_in_noise() -> None:
    """The word error rate would be meaningless if the recogniser heard digits in noise."""
    noise = np.random.default_rng(0).standard_normal((10, RATE)).astype(np.float32)
    heard = understood(list(noise))
    assert sum(map(len, heard)) <= 10


def test_the_recogniser_takes_strings_of_any_length() -> None:
    """Each output step covers two frames."""
    net, _ = recogniser()
    assert net(torch.zeros(2, MELS, 50)).shape == (25, 2, 11)


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [1, 3], 1),
        ([1, 3], [1, 2, 3], 1),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2, 3], [], 3),
        ([], [4, 4], 2),
        ([1, 2, 3, 4], [2, 3, 4, 5], 2),
    ],
)
def test_word_errors_is_the_levenshtein_distance(said: list[int], heard: list[int], errors: int) -> None:
    """The fewest insertions, deletions and substitutions of words."""
    assert word_errors(said, heard) == errors


def test_the_word_error_rate_is_over_all_words() -> None:
    """It is not the mean of the rates of the strings, and it may exceed 1."""
    assert word_error_rate([[1], [1, 2, 3]], [[2], [1, 2, 3]]) == 0.25
    assert word_error_rate([[1]], [[2, 3, 4]]) == 3
    with pytest.raises(ValueError, match=r"needs at least one word that was said"):
        word_error_rate([[]], [[1]])
