"""The project's own listeners: six speakers and ten digits, at any rate."""

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
    """Some strings as they sound, their speakers and their words."""
    dataset = SpokenDigits()
    plans = dataset.conditions(11, range(24))
    waves = [vocode(string) for string in dataset.real(plans).numpy()]
    digits = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    words = [" ".join(names[digit] for digit in string) for string in digits]
    return waves, [dataset.recordings.speakers[plan[0]] for plan in plans], words


def test_voices_of_one_speaker_are_nearer_than_those_of_two(spoken: Spoken) -> None:
    """Recordings that were not trained on, vocoded: as the file's own accuracy says."""
    waves, speakers, _ = spoken
    voices = DigitsSpeakers().embed(waves, RATE)
    torch.testing.assert_close(voices.norm(dim=1), torch.ones(len(waves)))
    cosines, alike = voices @ voices.T, torch.tensor([[one == other for other in speakers] for one in speakers])
    assert cosines[alike].mean() - cosines[~alike].mean() > 0.6
    net, facts = encoder()
    found = [facts["speakers"][number] for number in net.cosines(voices).argmax(dim=1)]
    assert np.mean([name == speaker for name, speaker in zip(found, speakers, strict=True)]) > 0.9
    assert facts["test_accuracy_vocoded"] > 0.95
    assert facts["test_equal_error_rate_vocoded"] < 0.05


def test_the_weights_are_small_enough_to_travel() -> None:
    """Half precision, below a megabyte."""
    assert WEIGHTS.stat().st_size < 1e6


def test_sound_at_another_rate_is_heard_alike(spoken: Spoken) -> None:
    """It is resampled to what the networks were trained at."""
    waves, _, words = spoken
    faster = [resampled(wave, RATE, 16000) for wave in waves[:6]]
    listener = DigitsSpeakers()
    assert (listener.embed(faster, 16000) * listener.embed(waves[:6], RATE)).sum(dim=1).min() > 0.95
    recogniser = plugins.build("recognisers", "digits")
    assert recogniser.transcribe(faster, 16000) == words[:6]


def test_where_nothing_can_be_heard_there_is_neither_voice_nor_word() -> None:
    """Empty, silent, not finite: NaN and no text, whatever else is in the batch."""
    nothing = [np.zeros(0, np.float32), np.zeros(4000, np.float32), np.full(4000, np.nan, np.float32)]
    assert DigitsSpeakers().embed(nothing, RATE).isnan().all()
    assert plugins.build("recognisers", "digits").transcribe(nothing, RATE) == ["", "", ""]


def test_text_is_compared_without_case_and_punctuation() -> None:
    """As recognisers write it or do not."""
    recogniser = plugins.build("recognisers", "digits")
    assert recogniser.words("Seven, ONE -- don't_stop!") == ["seven", "one", "don't", "stop"]
