"""Word error rate and speaker similarity, on real recordings and on recordings that are wrong on purpose."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.audio.mel import HOP, RATE, vocode
from orchestrator.audio.recognisers.digits import WORDS
from orchestrator.datasets.labels import Labels
from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Batch
from orchestrator.metrics.speaker_similarity import SpeakerSimilarity
from orchestrator.metrics.wer import WER

COUNT = 16


class Waves(SpokenDigits):
    """Spoken digits with a batch of strings that is vocoded once."""

    @cached_property
    def batch(self) -> Batch:
        plans = self.conditions(0, range(COUNT))
        waves = torch.stack([torch.from_numpy(vocode(string)) for string in self.real(plans).numpy()])
        return Batch(waves, plans, self, rate=RATE)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Waves().batch


def select(batch: Batch, rows: Any) -> Batch:
    assert batch.conditions is not None
    return replace(batch, samples=batch.samples[rows], conditions=batch.conditions[rows])


def test_real_recordings_are_understood(batch: Batch) -> None:
    """Nearly every word of vocoded strings from the shipped test split is understood."""
    metric = WER()
    numbers = metric.measure(batch).numpy()
    words = [len(said) for said in batch.dataset.said(batch.conditions)]  # type: ignore[attr-defined]
    assert numbers[:, 1].tolist() == words
    assert metric.summarise([numbers], batch.dataset).mean < 0.1
    assert metric.column == "wer[digits]"


def test_wrong_words_are_errors(batch: Batch) -> None:
    """Compared with the transcripts of other samples, most words are wrong."""
    assert batch.conditions is not None
    shifted = replace(batch, conditions=np.roll(batch.conditions, 1, axis=0))
    metric = WER()
    assert metric.summarise([metric.measure(shifted).numpy()], batch.dataset).mean > 0.5


def test_the_prompt_is_not_scored(batch: Batch) -> None:
    """Silencing the prompt changes no score, because only the part after it counts."""
    assert batch.conditions is not None
    silenced = batch.samples.clone()
    for wave, row in zip(silenced, batch.conditions, strict=True):
        wave[: int(row[-2]) * HOP] = 0
    metric = WER()
    assert torch.equal(metric.measure(replace(batch, samples=silenced)), metric.measure(batch))


def test_silence_has_every_word_wrong(batch: Batch) -> None:
    """A silent sample is neither perfect nor a missing value."""
    numbers = WER().measure(replace(batch, samples=torch.zeros_like(batch.samples)))
    assert torch.equal(numbers[:, 0], numbers[:, 1])


def test_similarity_is_higher_for_the_same_speaker(batch: Batch) -> None:
    """Compared with its own prompt and with the prompt of another speaker, for more than 90% of the strings."""
    assert batch.conditions is not None
    dataset = batch.dataset
    assert isinstance(dataset, SpokenDigits)
    metric = SpeakerSimilarity()
    own = metric.measure(batch)[:, 0]
    speakers = np.array([dataset.recordings.speakers[row[0]] for row in batch.conditions])
    others = [int(np.flatnonzero(speakers != name)[0]) for name in speakers]
    wrong = batch.conditions.copy()
    # Only the prompt is that of another speaker; the spoken part stays where it is.
    wrong[:, 0] = batch.conditions[others, 0]
    other = metric.measure(replace(batch, conditions=wrong))[:, 0]
    assert (own > other).double().mean() > 0.9
    assert own.mean() - other.mean() > 0.5
    assert metric.column == "speaker_similarity[digits_speakers]"


@pytest.mark.parametrize("metric", [WER(), SpeakerSimilarity()], ids=["wer", "speaker_similarity"])
def test_values_of_a_sample_do_not_depend_on_the_batch(batch: Batch, metric: Any) -> None:
    """Measured one by one or in one batch, values are equal to the last bit."""
    few = select(batch, slice(0, 4))
    alone = torch.cat([metric.measure(select(batch, slice(i, i + 1))) for i in range(4)])
    assert torch.equal(metric.measure(few), alone)


@pytest.mark.parametrize("metric", [WER(), SpeakerSimilarity()], ids=["wer", "speaker_similarity"])
def test_sound_that_is_not_finite_is_counted_and_not_averaged(batch: Batch, metric: Any) -> None:
    """The mean is over the other samples alone."""
    few = select(batch, slice(0, 4))
    broken = few.samples.clone()
    broken[2, -1] = torch.nan
    numbers = metric.measure(replace(few, samples=broken)).numpy()
    summary = metric.summarise([numbers], few.dataset)
    assert (summary.count, summary.not_finite) == (3, 1)
    kept = metric.summarise([metric.measure(select(few, [0, 1, 3])).numpy()], few.dataset)
    assert summary.mean == kept.mean


def test_a_silent_sample_has_no_similarity(batch: Batch) -> None:
    """It is counted as not finite, because silence has no embedding to compare."""
    silent = replace(select(batch, [0]), samples=torch.zeros_like(batch.samples[:1]))
    metric = SpeakerSimilarity()
    assert metric.summarise([metric.measure(silent).numpy()], batch.dataset).not_finite == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wer", r"metric 'wer' needs the transcript of each sample, which dataset Labels does not provide"),
        ("speaker_similarity", r"metric 'speaker_similarity' needs a recording of each voice, which dataset Labels"),
    ],
)
def test_a_dataset_without_speech_is_refused(name: str, message: str) -> None:
    """When the configuration is read."""
    with pytest.raises(ConfigError, match=message):
        plugins.build("metrics", name).check(Labels())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wer", {"recogniser": "wisper"}, r"unknown recogniser 'wisper' \(did you mean 'whisper'\?\)"),
        (
            "wer",
            {"recogniser": "whisper", "recogniser_options": {"weights": "nobody/none"}},
            r"`hf download nobody/none",
        ),
        ("speaker_similarity", {"encoder": "wavlm", "encoder_options": {"weights": "a/b"}}, r"needs the weights 'a/b'"),
    ],
)
def test_missing_networks_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the configuration is read, with the remedy. Nothing is downloaded."""
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        plugins.build("metrics", name, options).check(SpokenDigits())


def test_speech_metrics_refuse_real_samples(batch: Batch) -> None:
    """Real samples have neither a transcript nor the voice of a prompt."""
    real = replace(batch, conditions=None)
    with pytest.raises(ValueError, match=r"needs a transcript, and real samples have none"):
        WER().measure(real)
    with pytest.raises(ValueError, match=r"needs the voice of the prompt, and real samples have no prompt"):
        SpeakerSimilarity().measure(real)


def test_the_spoken_part_ends_with_the_string(batch: Batch) -> None:
    """`spoken` gives the part after the prompt in seconds. There are one transcript and one voice per string."""
    dataset, plans = batch.dataset, batch.conditions
    assert isinstance(dataset, SpokenDigits)
    assert plans is not None
    for (first, last), row in zip(dataset.spoken(plans), plans, strict=True):
        assert 0 < first < last == FRAMES * HOP / RATE
        assert first * RATE / HOP == row[-2]
    first_digits = dataset.said(plans[:1])[0]
    assert dataset.transcripts(plans[:1]) == [" ".join(WORDS[digit] for digit in first_digits)]
    assert all(rate == RATE and wave.ndim == 1 for wave, rate in dataset.voices(plans[:2]))
