"""Strings of spoken digits: the recordings, the conditioning and the words to be said agree."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.audio.mel import LOUDEST, MELS, SILENCE
from orchestrator.datasets.spoken_digits import DIGITS, FRAMES, NO_DIGIT, SpokenDigits


@pytest.fixture(scope="module")
def dataset() -> SpokenDigits:
    return SpokenDigits()


def test_the_test_split_ships_with_the_package(dataset: SpokenDigits) -> None:
    """Five takes of ten digits by six speakers, within the stored range of values."""
    recordings = dataset.recordings
    assert len(recordings.features) == 5 * 10 * 6
    assert np.bincount(recordings.digits).tolist() == [30] * DIGITS
    assert len(dataset.speakers) == 6
    values = np.concatenate(recordings.features, axis=1)
    assert values.shape[0] == MELS
    assert SILENCE <= values.min() < values.max() <= LOUDEST


def test_a_plan_depends_only_on_seed_and_index(dataset: SpokenDigits) -> None:
    """It does not depend on the rest of the batch, and changes with the seed."""
    plans = dataset.conditions(3, range(20))
    assert np.array_equal(plans[7:9], dataset.conditions(3, [7, 8]))
    assert not np.array_equal(plans, dataset.conditions(4, range(20)))


def test_strings_have_one_speaker_and_do_not_overlap(dataset: SpokenDigits) -> None:
    """Digits are separated by pauses and lie within the string; at least one follows the prompt."""
    for plan in dataset.conditions(0, range(200)):
        placed = dataset.placed(plan)
        assert len({dataset.recordings.speakers[number] for number, _ in placed}) == 1
        ends = [0, *(first + dataset.recordings.features[number].shape[1] for number, first in placed)]
        assert all(first >= end + 2 for (_, first), end in zip(placed, ends, strict=False))
        assert ends[-1] <= FRAMES
        assert len(placed) >= 2


def test_conditioning_is_the_prompt_the_mask_and_one_token_per_frame(dataset: SpokenDigits) -> None:
    """Masked frames of the prompt are zero, tokens are not; prompt and masked frames together are the string."""
    plans = dataset.conditions(1, range(32))
    real, condition = dataset.real(plans), dataset.infilling(plans)
    prompt, mask, tokens = condition[:, :MELS], condition[:, MELS], condition[:, MELS + 1]
    assert condition.shape == (32, MELS + 2, FRAMES)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (prompt.masked_select(mask[:, None].bool()) == 0).all()
    torch.testing.assert_close(torch.where(mask[:, None].bool(), real, prompt), real)
    assert ((tokens == NO_DIGIT) == (real == SILENCE).all(dim=1)).float().mean() > 0.95


def test_the_digits_to_be_said_are_those_after_the_prompt(dataset: SpokenDigits) -> None:
    """They are in the order of the tokens in the masked frames."""
    plans = dataset.conditions(2, range(32))
    condition = dataset.infilling(plans)
    for row, said in zip(condition, dataset.said(plans), strict=True):
        tokens = row[MELS + 1][row[MELS].bool()].long().tolist()
        runs = [token for token, before in zip(tokens, [NO_DIGIT, *tokens], strict=False) if token != before]
        assert [token for token in runs if token != NO_DIGIT] == said


def test_the_speaker_option_limits_the_dataset_to_one_speaker() -> None:
    """The option 'speaker' selects one of six subsets."""
    dataset = SpokenDigits(speaker="theo")
    speakers = {
        dataset.recordings.speakers[number]
        for plan in dataset.conditions(0, range(20))
        for number, _ in dataset.placed(plan)
    }
    assert speakers == {"theo"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, r"split must be train or test, got 'dev'"),
        ({"split": "train"}, r"the training split does not ship with the package; set folder"),
        ({"speaker": "nobody"}, r"unknown speaker 'nobody'; choose one of: george, jackson, lucas"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    """They are rejected before anything is sampled."""
    with pytest.raises(ValueError, match=message):
        SpokenDigits(**options)


def test_a_missing_file_is_reported_with_the_option_to_set(tmp_path: Path) -> None:
    """The message names the option that sets its folder."""
    with pytest.raises(ValueError, match=r"no file .*fsdd\.parquet; set the dataset's option 'folder'"):
        SpokenDigits(str(tmp_path)).conditions(0, [0])


def wav(seconds: float = 0.3) -> bytes:
    """A tone as a WAV file."""
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(int(8000 * seconds))), 8000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digit": [1, None]}, r"row 1 of .*fsdd\.parquet has no label: column 'digit' is null"),
        ({"digit": [1, 12]}, r"row 1 of .*fsdd\.parquet has digit 12; digits are 0 to 9"),
        ({"take": [7, 8]}, r"holds no recordings of the test split"),
        ({"speaker": ["a", None]}, r"row 1 of .*fsdd\.parquet has no text: column 'speaker' is null"),
        ({"audio": b"no sound"}, r"row 1 of .*fsdd\.parquet cannot be read as sound"),
        ({"audio": b""}, r"row 1 of .*fsdd\.parquet (cannot be read as|has no) sound"),
        ({"audio": "silence"}, r"row 1 of .*fsdd\.parquet has no sound; replace or remove it"),
    ],
)
def test_a_faulty_recording_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """By its row, when the dataset is checked."""
    if "audio" in changes:
        changes = {"audio": [wav(), wav(0) if changes["audio"] == "silence" else changes["audio"]]}
    columns = {"audio": [wav(), wav()], "digit": [1, 2], "speaker": ["a", "a"], "take": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "fsdd.parquet")
    SpokenDigits(str(tmp_path)).check()
    pq.write_table(pa.table(columns | changes), tmp_path / "fsdd.parquet")
    with pytest.raises(ValueError, match=message):
        SpokenDigits(str(tmp_path)).check()
