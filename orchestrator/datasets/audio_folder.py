"""Speech recordings in a folder with a manifest, as most corpora are laid out: transcripts and voice prompts."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from orchestrator.audio.mel import FloatArray, resampled
from orchestrator.datasets._parquet import check_columns
from orchestrator.datasets.base import Dataset, IntArray, uniform
from orchestrator.errors import ConfigError
from orchestrator.files import read_text
from orchestrator.plugins import PATH

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")


class Recording(NamedTuple):
    """A row of a manifest."""

    path: Path
    transcript: str
    speaker: str | None


@dataclass(frozen=True)
class AudioFolder(Dataset):
    """Speech recordings drawn uniformly from a manifest, e.g. of LibriSpeech or Common Voice (BNS appendix D.5).

    A condition is a row number. The text to speak is that row's transcript. The voice prompt is the speaker's next
    recording in the manifest; if the speaker has only one, or no speaker is listed, it is the recording itself.

    Attributes:
        folder: Folder of the recordings, in any format that libsndfile reads.
        manifest: File in that folder that lists them: ``.csv``, ``.tsv`` (unquoted), ``.jsonl`` or ``.parquet``.
        path: Column with each recording's path, relative to the folder.
        transcript: Column with the words spoken in it.
        speaker: Column with its speaker, if any.
        sha256: Expected sha256 of the manifest's bytes, if set; a manifest that differs is refused, so that pairs made
            from it are never confused with those of another version.

    Raises:
        ValueError: The manifest is missing, of an unknown format or empty, lacks a column, has a row without a path or
            transcript or with a path that leads out of the folder, or lists a recording that does not exist.
    """

    real_form = "sound"

    folder: str = field(metadata=PATH)
    manifest: str = "manifest.csv"
    path: str = "path"
    transcript: str = "transcript"
    speaker: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        for recording in self.recordings:
            if not recording.path.is_file():
                raise ValueError(
                    f"{self._manifest} lists {recording.path}, which does not exist; add the file or remove the row"
                )

    @property
    def _manifest(self) -> Path:
        return Path(self.folder) / self.manifest

    @cached_property
    def recordings(self) -> list[Recording]:
        """The rows of the manifest, in its order."""
        rows = [self._recording(number, row) for number, row in enumerate(self._rows(), start=1)]
        if not rows:
            raise ValueError(f"{self._manifest} lists no recordings; give at least one")
        return rows

    def _rows(self) -> list[dict[str, Any]]:
        manifest = self._manifest
        if manifest.suffix not in KINDS:
            raise ValueError(f"manifest {manifest} must end in one of {', '.join(KINDS)}")
        if not manifest.is_file():
            raise ValueError(f"no manifest at {manifest}; set the dataset's options 'folder' and 'manifest'")
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            raise ValueError(f"{manifest} has sha256 {digest}, not {self.sha256}; use the one the pairs were made from")
        rows, columns = _read(manifest)
        for column in filter(None, (self.path, self.transcript, self.speaker)):
            if columns and column not in columns:
                raise ValueError(f"{manifest} has no column {column!r}; its columns are: {', '.join(columns)}")
        return rows

    def _recording(self, number: int, row: dict[str, Any]) -> Recording:
        path, transcript = row.get(self.path), row.get(self.transcript)
        for column, value in ((self.path, path), (self.transcript, transcript)):
            if not isinstance(value, str) or (column == self.path and not value):
                raise ValueError(f"row {number} of {self._manifest} has no text in column {column!r}, got {value!r}")
        assert isinstance(path, str)
        assert isinstance(transcript, str)
        within = os.path.normpath(path)
        absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
        if absolute or within.split(os.sep)[0] == os.pardir:
            raise ValueError(f"row {number} of {self._manifest} leads out of its folder: {path!r}; use paths within it")
        speaker = row.get(self.speaker) if self.speaker else None
        return Recording(Path(self.folder) / within, transcript, None if speaker is None else str(speaker))

    @cached_property
    def _voices(self) -> list[int]:
        """For each recording, the number of the recording that serves as its voice prompt."""
        by_speaker: dict[str, list[int]] = {}
        for number, recording in enumerate(self.recordings):
            if recording.speaker is not None:
                by_speaker.setdefault(recording.speaker, []).append(number)
        prompts = list(range(len(self.recordings)))
        for numbers in by_speaker.values():
            for place, number in enumerate(numbers):
                prompts[number] = numbers[(place + 1) % len(numbers)]
        return prompts

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return uniform(seed, indices, len(self.recordings))

    def conditioned_on(self) -> Iterable[Any]:
        return [row.transcript for row in self.recordings], self._voices, *self.real_parts()

    def real_parts(self) -> Iterable[Any]:
        return [recording.path for recording in self.recordings]

    def texts(self, conditions: Sequence[int]) -> list[str]:
        """The transcripts of these recordings."""
        return [self.recordings[number].transcript for number in conditions]

    transcripts = texts

    def spoken(self, conditions: Sequence[int]) -> list[tuple[float, float]]:
        """The span of each whole recording: 0 and its length, in seconds."""
        return [(0.0, self._opened(number, "info").duration) for number in conditions]

    def voices(self, conditions: Sequence[int]) -> list[tuple[FloatArray, int]]:
        """The voice prompt of each recording, and its sample rate in Hz."""
        return [self.wave(self._voices[number]) for number in conditions]

    def wave(self, number: int) -> tuple[FloatArray, int]:
        """One recording, (samples,), float32 in [-1, 1], its channels averaged, and its sample rate in Hz.

        Raises:
            ConfigError: soundfile is missing, or the file cannot be read.
        """
        channels, rate = self._opened(number, "read", dtype="float32", always_2d=True)
        return np.ascontiguousarray(channels.mean(axis=1)), int(rate)

    @cached_property
    def rate(self) -> int:
        """Sample rate of :meth:`real_samples` in Hz: that of the first recording."""
        return int(self._opened(0, "info").samplerate)

    def real_count(self) -> int:
        return len(self.recordings)

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("soundfile") is not None:  # without it, only transcripts can be used
            self.check_real()

    def check_real(self) -> None:
        for number, recording in enumerate(self.recordings):
            if not self._opened(number, "info").frames:
                raise ValueError(f"{recording.path} has no sound; replace it or remove it from the manifest")

    def real_samples(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """These recordings as waves at :attr:`rate`, (len(indices), N), padded with silence to the longest."""
        waves = [resampled(*self.wave(number), self.rate) for number in indices]
        padded = np.zeros((len(waves), max(map(len, waves), default=0)), dtype=np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        return padded

    def _opened(self, number: int, function: str, **options: Any) -> Any:
        try:
            import soundfile
        except ImportError as error:
            raise ConfigError("reading sound needs soundfile; pip install 'bespoke-solvers[audio]'") from error
        path = self.recordings[number].path
        try:
            return getattr(soundfile, function)(str(path), **options)
        except (OSError, soundfile.LibsndfileError) as error:
            raise ConfigError(
                f"{path} cannot be read as sound: {error}; replace it or remove it from the manifest"
            ) from error


def _read(manifest: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and column names of a manifest; an empty JSONL file has no column names."""
    if manifest.suffix == ".parquet":
        check_columns(manifest, [])
        table = pq.read_table(manifest)
        return table.to_pylist(), table.column_names
    text = read_text(manifest)
    if manifest.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} of {manifest} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {manifest} is not a JSON object: {line!r}")
                rows.append(row)
        return rows, sorted({column for row in rows for column in row})
    lines = io.StringIO(text, newline="")
    if manifest.suffix == ".tsv":
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines)
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(
                f"row {number} of {manifest} has more fields than the header; put texts with a separator in quotes"
            )
    return rows, list(reader.fieldnames or [])


DATASET = AudioFolder
