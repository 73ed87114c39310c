"""Word error rate and speaker similarity, on recordings that are known to be right and on some that are not."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.audio.digits_recogniser import WORDS
from orchestrator.audio.mel import HOP, RATE, vocode
from orchestrator.datasets.labels import Labels
from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Batch
from orchestrator.metrics.speaker_similarity import SpeakerSimilarity
from orchestrator.metrics.wer import WER

COUNT = 16


class Waves(SpokenDigits):
    """Spoken digits whose strings were vocoded once."""

    @cached_property
    def batch(self) -> Batch:
        plans = self.conditions(0, range(COUNT))
        waves = torch.stack([torch.from_numpy(vocode(string)) for string in self.real(plans).numpy()])
        return Batch(waves, plans, self, rate=RATE)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Waves().batch


def of(batch: Batch, rows: Any) -> Batch:
    assert batch.conditions is not None
    return replace(batch, samples=batch.samples[rows], conditions=batch.conditions[rows])


def test_real_recordings_are_understood(batch: Batch) -> None:
    """Strings of the shipped test split, vocoded: nearly every word to be spoken is understood."""
    metric = WER()
    numbers = metric.measure(batch).numpy()
    words = [len(said) for said in batch.dataset.said(batch.conditions)]  # type: ignore[attr-defined]
    assert numbers[:, 1].tolist() == words
    assert metric.summarise([numbers], batch.dataset).mean < 0.1
    assert metric.column == "wer[digits]"


def test_the_wrong_words_are_errors(batch: Batch) -> None:
    """The same sound against what others were to say: most words are wrong."""
    assert batch.conditions is not None
    shifted = replace(batch, conditions=np.roll(batch.conditions, 1, axis=0))
    metric = WER()
    assert metric.summarise([metric.measure(shifted).numpy()], batch.dataset).mean > 0.5


def test_the_prompt_is_not_heard(batch: Batch) -> None:
    """Silence in its place changes no word: only the part that is to be spoken counts."""
    assert batch.conditions is not None
    silenced = batch.samples.clone()
    for wave, row in zip(silenced, batch.conditions, strict=True):
        wave[: int(row[-2]) * HOP] = 0
    metric = WER()
    assert torch.equal(metric.measure(replace(batch, samples=silenced)), metric.measure(batch))


def test_silence_has_every_word_wrong(batch: Batch) -> None:
    """A model that says nothing is not perfect, and it is no missing value either."""
    numbers = WER().measure(replace(batch, samples=torch.zeros_like(batch.samples)))
    assert torch.equal(numbers[:, 0], numbers[:, 1])


def test_the_same_speaker_is_more_alike_than_another(batch: Batch) -> None:
    """Against the own prompt, and against a prompt of somebody else, for every string but few."""
    assert batch.conditions is not None
    dataset = batch.dataset
    assert isinstance(dataset, SpokenDigits)
    metric = SpeakerSimilarity()
    own = metric.measure(batch)[:, 0]
    who = np.array([dataset.recordings.speakers[row[0]] for row in batch.conditions])
    others = [int(np.flatnonzero(who != name)[0]) for name in who]
    wrong = batch.conditions.copy()
    # Somebody else's prompt; what is to be spoken stays where it is.
    wrong[:, 0] = batch.conditions[others, 0]
    other = metric.measure(replace(batch, conditions=wrong))[:, 0]
    assert (own > other).double().mean() > 0.9
    assert own.mean() - other.mean() > 0.5
    assert metric.column == "speaker_similarity[digits_speakers]"


@pytest.mark.parametrize("metric", [WER(), SpeakerSimilarity()], ids=["wer", "speaker_similarity"])
def test_a_samples_numbers_do_not_depend_on_the_batch(batch: Batch, metric: Any) -> None:
    """One by one or together: to the last bit."""
    few = of(batch, slice(0, 4))
    alone = torch.cat([metric.measure(of(batch, slice(i, i + 1))) for i in range(4)])
    assert torch.equal(metric.measure(few), alone)


@pytest.mark.parametrize("metric", [WER(), SpeakerSimilarity()], ids=["wer", "speaker_similarity"])
def test_sound_that_is_not_finite_is_counted_and_not_averaged(batch: Batch, metric: Any) -> None:
    """The others' mean is theirs alone."""
    few = of(batch, slice(0, 4))
    broken = few.samples.clone()
    broken[2, -1] = torch.nan
    numbers = metric.measure(replace(few, samples=broken)).numpy()
    summary = metric.summarise([numbers], few.dataset)
    assert (summary.count, summary.not_finite) == (3, 1)
    kept = metric.summarise([metric.measure(of(few, [0, 1, 3])).numpy()], few.dataset)
    assert summary.mean == kept.mean


def test_a_silent_sample_has_nobodys_voice(batch: Batch) -> None:
    """Its similarity is counted as missing; a cosine with nothing would be an invention."""
    silent = replace(of(batch, [0]), samples=torch.zeros_like(batch.samples[:1]))
    metric = SpeakerSimilarity()
    assert metric.summarise([metric.measure(silent).numpy()], batch.dataset).not_finite == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wer", r"metric 'wer' needs the words that each sample is to say, and dataset Labels has none"),
        ("speaker_similarity", r"metric 'speaker_similarity' needs a recording of each voice, and dataset Labels has"),
    ],
)
def test_a_dataset_that_does_not_speak_is_refused(name: str, message: str) -> None:
    """While the configuration is read."""
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
def test_networks_that_are_not_there_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the configuration is read, with the remedy: nothing is downloaded unasked."""
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        plugins.build("metrics", name, options).check(SpokenDigits())


def test_metrics_without_what_was_asked_for_say_so(batch: Batch) -> None:
    """Real samples have neither words that were to be said nor a voice that was asked for."""
    real = replace(batch, conditions=None)
    with pytest.raises(ValueError, match=r"needs the words that were to be said"):
        WER().measure(real)
    with pytest.raises(ValueError, match=r"needs the voice that was asked for"):
        SpeakerSimilarity().measure(real)


def test_what_is_to_be_spoken_ends_with_the_string(batch: Batch) -> None:
    """Seconds of the part after the prompt; words and voices are one a string."""
    dataset, plans = batch.dataset, batch.conditions
    assert isinstance(dataset, SpokenDigits)
    assert plans is not None
    for (first, last), row in zip(dataset.spoken(plans), plans, strict=True):
        assert 0 < first < last == FRAMES * HOP / RATE
        assert first * RATE / HOP == row[-2]
    first_digits = dataset.said(plans[:1])[0]
    assert dataset.transcripts(plans[:1]) == [" ".join(WORDS[digit] for digit in first_digits)]
    assert all(rate == RATE and wave.ndim == 1 for wave, rate in dataset.voices(plans[:2]))
