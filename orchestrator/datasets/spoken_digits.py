"""Strings of digits by one speaker: the first digit is the prompt, and the model must speak the others.

The recordings are those of the Free Spoken Digit Dataset (CC BY-SA 4.0), as log-mel frames. Its test split ships with
the package; the training split is read from a folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.audio.mel import HOP, LOUDEST, MELS, RATE, SILENCE, audible, log_mel, vocode
from orchestrator.audio.recognisers.digits import WORDS
from orchestrator.datasets._parquet import check_columns, labels, texts
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.plugins import PATH
from orchestrator.randomness import generator

FRAMES = 96
"""Frames per string: 1.5 s."""
LONGEST = 5
"""Maximum number of recordings per string."""
DIGITS = 10
NO_DIGIT, UNKNOWN = 10, 11
"""Tokens for frames between digits, and for frames whose digit is withheld."""
TEST_TAKES = 5
"""Takes below this number are the test split, following the authors of the dataset."""
SHIPPED = Path(__file__).parent / "data" / "spoken_digits.safetensors"
METADATA_KEY = "bespoke_recordings"
STEPS = 255
"""Quantisation levels of a stored log-mel value, from silence to the loudest."""

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class Recordings(NamedTuple):
    """Recordings of single digits.

    Attributes:
        features: Normalised log-mel amplitudes of each recording, (MELS, its frames).
        digits: The digit spoken in each, (N,).
        speakers: Name of the speaker of each.
    """

    features: list[FloatArray]
    digits: IntArray
    speakers: list[str]


@dataclass(frozen=True)
class SpokenDigits(Dataset):
    """Strings of spoken digits, 1.5 seconds each: recordings of one speaker with short pauses, the first as prompt.

    A condition is a plan, int64 (2 LONGEST + 2,): number and first frame of each recording (-1 if unused), then the
    first frame of the part to be spoken and the frame after its end. :meth:`infilling` turns plans into the
    conditioning of a model.

    Attributes:
        folder: Folder of ``fsdd.parquet`` (columns ``audio``, a WAV file, ``digit``, ``speaker``, ``take``); without
            one, the test recordings that ship with the package are used.
        split: Split of the recordings in the folder, ``train`` or ``test``.
        speaker: Use recordings of this speaker only.

    Raises:
        ValueError: The split or speaker is unknown, or the training split is chosen without a folder.
    """

    folder: str | None = field(default=None, metadata=PATH)
    split: Literal["train", "test"] = "test"
    speaker: str | None = None

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {self.split!r}")
        if self.split == "train" and self.folder is None:
            raise ValueError(
                "the training split does not ship with the package; set folder to the folder of fsdd.parquet"
            )
        if self.speaker is not None and self.speaker not in self.speakers:
            raise ValueError(f"unknown speaker {self.speaker!r}; choose one of: {', '.join(self.speakers)}")

    @cached_property
    def recordings(self) -> Recordings:
        return shipped_recordings() if self.folder is None else read_recordings(Path(self.folder), self.split)

    @cached_property
    def speakers(self) -> list[str]:
        return sorted(set(self.recordings.speakers))

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return np.stack([self._plan(generator(seed, i, "condition")) for i in indices])

    def conditioned_on(self) -> Iterable[Any]:
        recordings = self.recordings
        return self.speaker, recordings.speakers, recordings.digits, *recordings.features

    def _plan(self, rng: np.random.Generator) -> IntArray:
        speaker = self.speaker or self.speakers[rng.integers(len(self.speakers))]
        own = self._of_speaker[speaker]
        row = np.full(2 * LONGEST + 2, -1, dtype=np.int64)
        frame = 0
        for place in range(LONGEST):
            number = own[rng.integers(len(own))]
            length = self.recordings.features[number].shape[1]
            first = frame + int(rng.integers(2, 6))
            if first + length > FRAMES - 2:
                break
            row[2 * place : 2 * place + 2] = number, first
            frame = first + length
            if place == 0:
                row[-2:] = frame + 1, FRAMES
        # A string needs a prompt and at least one digit to speak.
        return row if row[-1] > 0 and row[2] >= 0 else self._plan(rng)

    @cached_property
    def _of_speaker(self) -> dict[str, IntArray]:
        names = np.array(self.recordings.speakers)
        return {speaker: np.flatnonzero(names == speaker) for speaker in set(self.recordings.speakers)}

    def real(self, conditions: IntArray) -> Tensor:
        """Log-mel frames of the recorded strings, (B, MELS, FRAMES), float32."""
        strings = np.full((len(conditions), MELS, FRAMES), SILENCE, dtype=np.float32)
        for string, row in zip(strings, conditions, strict=True):
            for number, first in self.placed(row):
                features = self.recordings.features[number]
                string[:, first : first + features.shape[1]] = features
        return torch.from_numpy(strings)

    def infilling(self, conditions: IntArray) -> Tensor:
        """The conditioning of a model, (B, MELS + 2, FRAMES), float32.

        The channels are the prompt (0 in masked frames), the mask (1 in masked frames) and the token of each frame: a
        digit or :data:`NO_DIGIT`.
        """
        masked = np.zeros((len(conditions), 1, FRAMES), dtype=np.float32)
        tokens = np.full((len(conditions), 1, FRAMES), NO_DIGIT, dtype=np.float32)
        for span, token, row in zip(masked, tokens, conditions, strict=True):
            span[:, row[-2] : row[-1]] = 1
            for number, first in self.placed(row):
                length = self.recordings.features[number].shape[1]
                token[:, first : first + length] = self.recordings.digits[number]
        mask = torch.from_numpy(masked)
        return torch.cat([self.real(conditions) * (1 - mask), mask, torch.from_numpy(tokens)], dim=1)

    def said(self, conditions: IntArray) -> list[list[int]]:
        """The digits to be spoken in each string, in order."""
        return [[int(self.recordings.digits[number]) for number, _ in self.placed(row)[1:]] for row in conditions]

    def transcripts(self, conditions: IntArray) -> list[str]:
        """The digits to be spoken as English words, e.g. "seven one"."""
        return [" ".join(WORDS[digit] for digit in digits) for digits in self.said(conditions)]

    def spoken(self, conditions: IntArray) -> list[tuple[float, float]]:
        """Start and end, in seconds, of the part of each string to be spoken, which follows the prompt."""
        return [(int(row[-2]) * HOP / RATE, int(row[-1]) * HOP / RATE) for row in conditions]

    def voices(self, conditions: IntArray) -> list[tuple[FloatArray, int]]:
        """Wave of each string's prompt, and its sample rate in Hz.

        It is vocoded like a model's samples, so that a speaker encoder compares voices and not recording conditions.
        """
        return [(vocode(self.recordings.features[self.placed(row)[0][0]]), RATE) for row in conditions]

    @staticmethod
    def placed(row: IntArray) -> list[tuple[int, int]]:
        """Number and first frame of each recording in a plan."""
        pairs = row[:-2].reshape(-1, 2)
        return [(int(number), int(first)) for number, first in pairs if number >= 0]


def read_recordings(folder: Path, split: str) -> Recordings:
    """Read the recordings of a split as log-mel frames.

    Raises:
        ConfigError: soundfile is missing.
        ValueError: The file does not exist, lacks a column, holds none of this split, or a row is not a recording of a
            digit; names the row.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ConfigError("reading sound needs soundfile; pip install 'bespoke-solvers[audio]'") from error
    path = folder / "fsdd.parquet"
    if not path.is_file():
        raise ValueError(f"no file {path}; set the dataset's option 'folder' to the folder of fsdd.parquet")
    check_columns(path, ("audio", "digit", "speaker", "take"))
    digits, speakers = labels(path, "digit"), texts(path, "speaker")
    rows = np.flatnonzero((labels(path, "take") < TEST_TAKES) == (split == "test"))
    if not len(rows):
        raise ValueError(
            f"{path} holds no recordings of the {split} split; takes below {TEST_TAKES} are the test split"
        )
    encoded = pq.read_table(path, columns=["audio"])["audio"]
    features = []
    for row in rows:
        if digits[row] >= DIGITS:
            raise ValueError(f"row {row} of {path} has digit {digits[row]}; digits are 0 to {DIGITS - 1}")
        try:
            wave = soundfile.read(io.BytesIO(encoded[row].as_py()), dtype="float32")[0]
        except (OSError, TypeError, soundfile.LibsndfileError) as error:
            raise ValueError(f"row {row} of {path} cannot be read as sound: {error}; replace or remove it") from error
        if not audible(wave):
            raise ValueError(f"row {row} of {path} has no sound; replace or remove it")
        features.append(log_mel(wave)[:, : FRAMES // 2])  # a few recordings are far longer than any digit
    return Recordings(features, digits[rows], [speakers[row] for row in rows])


def shipped_recordings() -> Recordings:
    """The recordings that ship with the package; their values are rounded to :data:`STEPS` levels."""
    with safe_open(SHIPPED, framework="np") as file:
        described = json.loads(file.metadata()[METADATA_KEY])
        stored, lengths, digits = (file.get_tensor(name) for name in ("features", "lengths", "digits"))
    values = (stored.astype(np.float32) / STEPS) * (LOUDEST - SILENCE) + SILENCE
    features = np.split(values.astype(np.float32), np.cumsum(lengths)[:-1], axis=1)
    return Recordings(features, digits.astype(np.int64), described["speakers"])


DATASET = SpokenDigits
