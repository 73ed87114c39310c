"""The digits speaker encoder (six speakers) and the digits recogniser: accuracy, sampling rates and unusable input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.audio.mel import RATE, resampled, vocode
from orchestrator.audio.speaker_encoders.digits_speakers import WEIGHTS, DigitsSpeakers, encoder
from orchestrator.datasets.spoken_digits import SpokenDigits

Spoken = tuple[list[np.ndarray], list[str], list[str]]


@pytest.fixture(scope="module")
def spoken() -> Spoken:
    """Vocoded strings of digits, their speakers and their transcripts."""
    dataset = SpokenDigits()
    plans = dataset.conditions(11, range(24))
    waves = [vocode(string) for string in dataset.real(plans).numpy()]
    digits = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    words = [" ".join(names[digit] for digit in string) for string in digits]
    return waves, [dataset.recordings.speakers[plan[0]] for plan in plans], words


def test_embeddings_of_one_speaker_are_closer_than_those_of_two(spoken: Spoken) -> None:
    """On vocoded recordings outside the training set, the encoder is as accurate as its file says."""
    waves, speakers, _ = spoken
    voices = DigitsSpeakers().embed(waves, RATE)
    torch.testing.assert_close(voices.norm(dim=1), torch.ones(len(waves)))
    cosines, same_speaker = voices @ voices.T, torch.tensor([[one == other for other in speakers] for one in speakers])
    assert cosines[same_speaker].mean() - cosines[~same_speaker].mean() > 0.6
    net, facts = encoder()
    predicted = [facts["speakers"][number] for number in net.cosines(voices).argmax(dim=1)]
    assert np.mean([name == speaker for name, speaker in zip(predicted, speakers, strict=True)]) > 0.9
    assert facts["test_accuracy_vocoded"] > 0.95
    assert facts["test_equal_error_rate_vocoded"] < 0.05


def test_the_weights_file_is_smaller_than_a_megabyte() -> None:
    """They are stored in half precision."""
    assert WEIGHTS.stat().st_size < 1e6


def test_the_sampling_rate_does_not_change_the_result(spoken: Spoken) -> None:
    """Sound at another rate is resampled to the rate the networks were trained at."""
    waves, _, words = spoken
    at_16_khz = [resampled(wave, RATE, 16000) for wave in waves[:6]]
    listener = DigitsSpeakers()
    assert (listener.embed(at_16_khz, 16000) * listener.embed(waves[:6], RATE)).sum(dim=1).min() > 0.95
    recogniser = plugins.build("recognisers", "digits")
    assert recogniser.transcribe(at_16_khz, 16000) == words[:6]


def test_inaudible_waves_have_nan_embeddings_and_empty_transcripts() -> None:
    """A wave is inaudible if it is empty, silent or not finite."""
    inaudible = [np.zeros(0, np.float32), np.zeros(4000, np.float32), np.full(4000, np.nan, np.float32)]
    assert DigitsSpeakers().embed(inaudible, RATE).isnan().all()
    assert plugins.build("recognisers", "digits").transcribe(inaudible, RATE) == ["", "", ""]


def test_text_is_compared_without_case_or_punctuation() -> None:
    """Recognisers differ in how they write both."""
    recogniser = plugins.build("recognisers", "digits")
    assert recogniser.words("Seven, ONE -- don't_stop!") == ["seven", "one", "don't", "stop"]
