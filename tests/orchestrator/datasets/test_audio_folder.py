"""Folders of recordings with a manifest: every manifest format, and every error in a manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator import plugins
from orchestrator.datasets.audio_folder import AudioFolder
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Batch
from orchestrator.metrics.speaker_similarity import SpeakerSimilarity
from orchestrator.metrics.wer import WER

soundfile = pytest.importorskip("soundfile")

ROWS = [
    {"path": "a/0.wav", "transcript": 'she said "one, two"', "speaker": "ann"},
    {"path": "a/1.wav", "transcript": "three", "speaker": "ann"},
    {"path": "b.flac", "transcript": "four five", "speaker": "bob"},
]
RATES = (8000, 16000, 8000)
SECONDS = (0.5, 0.25, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings by two speakers; the second is stereo and has a higher sample rate."""
    (tmp_path / "a").mkdir()
    for number, (row, rate, seconds) in enumerate(zip(ROWS, RATES, SECONDS, strict=True)):
        wave = 0.5 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(int(rate * seconds)) / rate)
        soundfile.write(tmp_path / row["path"], np.stack([wave, 0 * wave], 1) if number == 1 else wave, rate)
    return tmp_path


def write_manifest(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows as a manifest in the format given by the suffix of ``name``."""
    columns = list(rows[0]) if rows else ["path", "transcript"]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith(".jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    elif name.endswith(".tsv"):
        lines = ["\t".join(row[column] for column in columns) for row in rows]
        (folder / name).write_text("\n".join(["\t".join(columns), *lines]), encoding="utf-8")
    else:
        lines = [",".join('"' + row[column].replace('"', '""') + '"' for column in columns) for row in rows]
        (folder / name).write_text("\n".join([",".join(columns), *lines]), encoding="utf-8")


def build_dataset(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> AudioFolder:
    """Write the rows to manifest.csv and build the dataset."""
    write_manifest(folder, "manifest.csv", rows)
    dataset: AudioFolder = plugins.build("datasets", "audio_folder", {"folder": str(folder), **options})
    return dataset


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_manifest_format_gives_the_same_dataset(folder: Path, kind: str) -> None:
    """Rows, order, quotes and commas survive each format, so each pair has the same transcript."""
    write_manifest(folder, f"list.{kind}", ROWS)
    dataset = AudioFolder(str(folder), manifest=f"list.{kind}", speaker="speaker")
    assert dataset.transcripts([0, 1, 2]) == dataset.texts([0, 1, 2]) == [row["transcript"] for row in ROWS]
    assert dataset.conditions(3, range(30)).tolist() == build_dataset(folder).conditions(3, range(30)).tolist()
    assert set(dataset.conditions(3, range(30)).tolist()) == {0, 1, 2}


def test_column_names_can_be_chosen(folder: Path) -> None:
    """Common Voice, for example, names its columns sentence and client_id."""
    rows = [{"file": row["path"], "sentence": row["transcript"], "client_id": row["speaker"]} for row in ROWS]
    dataset = build_dataset(folder, rows, path="file", transcript="sentence", speaker="client_id")
    assert dataset.transcripts([2]) == ["four five"]
    assert dataset.recordings[2].speaker == "bob"


def test_waves_keep_their_rate_and_real_samples_share_one(folder: Path) -> None:
    """A wave is mono at its own rate. Real samples have the first recording's rate; shorter ones end in silence."""
    dataset = build_dataset(folder)
    wave, rate = dataset.wave(1)
    assert rate == 16000
    assert wave.shape == (4000,)
    assert np.abs(wave).max() == pytest.approx(0.25, abs=1e-3)
    assert dataset.spoken([0, 1, 2]) == [(0.0, seconds) for seconds in SECONDS]
    assert dataset.real_count() == 3
    assert dataset.rate == 8000
    real = dataset.real_samples([1, 2])
    assert real.shape == (2, 8000)
    assert real.dtype == np.float32
    assert (real[0, 2000:] == 0).all()
    assert np.abs(real[0, :2000]).max() > 0.2


def test_the_reference_voice_is_another_recording_of_the_speaker(folder: Path) -> None:
    """The next recording of the speaker; the same recording if there is no other, or no speaker column."""
    with_speakers, without_speakers = build_dataset(folder, speaker="speaker"), build_dataset(folder)

    def rates(dataset: AudioFolder) -> list[int]:
        return [rate for _, rate in dataset.voices([0, 1, 2])]

    assert rates(with_speakers) == [16000, 8000, 8000]
    assert rates(without_speakers) == list(RATES)
    np.testing.assert_array_equal(with_speakers.voices([1])[0][0], with_speakers.wave(0)[0])
    np.testing.assert_array_equal(with_speakers.voices([2])[0][0], with_speakers.wave(2)[0])


def test_speech_metrics_accept_an_audio_folder(folder: Path) -> None:
    """The dataset provides words, spans and voices. A recording is most similar to itself; a tone contains no words."""
    dataset = build_dataset(folder)
    batch = Batch(torch.from_numpy(dataset.real_samples([0, 2])), np.array([0, 2]), dataset, rate=dataset.rate)
    for metric in (WER(), SpeakerSimilarity()):
        metric.check(dataset)
    assert WER().measure(batch)[:, 1].tolist() == [4, 2]
    torch.testing.assert_close(SpeakerSimilarity().measure(batch)[:, 0], torch.ones(2).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"manifest": "none.csv"}, r"no manifest at .*none\.csv; set the dataset's options 'folder' and"),
        (ROWS, {"manifest": "list.xlsx"}, r"list\.xlsx must end in one of \.csv, \.tsv, \.jsonl, \.parquet"),
        (ROWS, {"transcript": "text"}, r"has no column 'text'; its columns are: path, transcript, speaker"),
        (ROWS, {"speaker": "who"}, r"has no column 'who'; its columns are: path, transcript, speaker"),
        ([], {}, r"manifest\.csv lists no recordings; give at least one"),
        ([{**ROWS[0], "path": "c.wav"}], {}, r"manifest\.csv lists .*c\.wav, which does not exist; add the file or"),
        (
            [{**ROWS[0], "path": "../c.wav"}],
            {},
            r"row 1 of .* leads out of its folder: '\.\./c\.wav'; use paths within",
        ),
        ([{**ROWS[0], "path": "a/../../c.wav"}], {}, r"row 1 of .* leads out of its folder: 'a/\.\./\.\./c\.wav'"),
        ([{**ROWS[0], "path": "/c.wav"}], {}, r"row 1 of .* leads out of its folder: '/c\.wav'"),
        ([{**ROWS[0], "path": ""}], {}, r"row 1 of .* has no text in column 'path', got ''"),
    ],
)
def test_an_invalid_manifest_is_rejected(
    folder: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    """The error is raised when the dataset is built, and says what is wrong and where."""
    with pytest.raises(ConfigError, match=message):
        build_dataset(folder, rows, **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 1 of .*list\.jsonl is not JSON: "),
        ("[1]", r"line 1 of .*list\.jsonl is not a JSON object: '\[1\]'"),
        ('{"path": "b.flac", "transcript": null}', r"row 1 of .* has no text in column 'transcript', got None"),
    ],
)
def test_a_malformed_manifest_line_is_rejected(folder: Path, line: str, message: str) -> None:
    """The message contains the line number."""
    (folder / "list.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AudioFolder(str(folder), manifest="list.jsonl")


def test_an_unreadable_recording_is_reported_when_it_is_opened(folder: Path) -> None:
    """Recordings are not read when the dataset is built."""
    dataset = build_dataset(folder)
    (folder / "b.flac").write_text("no sound", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.flac cannot be read as sound: .*; replace it or remove it from the man"):
        dataset.wave(2)
    with pytest.raises(ConfigError, match=r"b\.flac cannot be read as sound"):
        dataset.spoken([2])


def test_a_changed_manifest_is_rejected_by_its_sha256(folder: Path) -> None:
    """With a sha256 in the configuration, stored pairs cannot be used with other recordings."""
    write_manifest(folder, "manifest.csv", ROWS)
    sha256 = hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest()
    assert build_dataset(folder, sha256=sha256).real_count() == 3
    with pytest.raises(ConfigError, match=rf"has sha256 \w+, not {sha256}; use the one the pairs were made from"):
        build_dataset(folder, ROWS[:2], sha256=sha256)


@pytest.mark.parametrize("spoil", ["empty", "no sound", "another kind"])
def test_a_recording_that_cannot_be_read_is_named_before_work_starts(folder: Path, spoil: str) -> None:
    """By the headers of all recordings."""
    dataset = build_dataset(folder)
    dataset.check()
    if spoil == "no sound":
        soundfile.write(folder / "b.flac", np.zeros(0), 8000)
    else:
        (folder / "b.flac").write_bytes(b"" if spoil == "empty" else b"no sound")
    with pytest.raises((ConfigError, ValueError), match=r"b\.flac (cannot be read|has no sound).*; replace it"):
        dataset.check()
