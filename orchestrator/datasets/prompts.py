"""Prompts: the conditioning of models of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from orchestrator.datasets.base import Dataset
from orchestrator.randomness import generator


@dataclass(frozen=True)
class Prompts(Dataset):
    """Prompts drawn uniformly from a list, a text file (one a line) or a column of a Parquet file.

    A condition is a prompt's number; the model adapter encodes the text of it (:meth:`texts`).

    Attributes:
        prompts: The prompts themselves; used where no file is given.
        file: A ``.txt`` or ``.parquet`` file of prompts instead.
        column: The Parquet column.
        sha256: Of the file's bytes, so that pairs of a changed file are never taken for those of another; the file is
            refused where it differs. Checked where it is given.

    Raises:
        ValueError: No prompts, a file that is not there or of another kind, or a column it does not have.
    """

    prompts: tuple[str, ...] = ("a photograph of a cat", "a painting of a lighthouse at dusk", "a bowl of ripe peaches")
    file: str | None = None
    column: str = "prompt"
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.sha256 is not None:
            raise ValueError("sha256 is that of a file, and no file is given; leave it out")
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts must be a list of texts, got {self.prompts!r}")
        if not self._all:
            raise ValueError(f"{self.file or 'the list'} holds no prompts; give at least one")

    @cached_property
    def _all(self) -> tuple[str, ...]:
        return tuple(self.prompts) if self.file is None else self._read(Path(self.file))

    def _read(self, path: Path) -> tuple[str, ...]:
        if not path.is_file():
            raise ValueError(f"no prompts file at {path}; give an existing .txt or .parquet file")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.sha256 is not None and found != self.sha256:
            raise ValueError(f"{path} has sha256 {found}, not {self.sha256}; give the file those pairs were made of")
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
        if path.suffix != ".parquet":
            raise ValueError(f"prompts file {path} is neither .txt (one prompt a line) nor .parquet")
        schema = pq.read_schema(path)
        if self.column not in schema.names:
            raise ValueError(f"{path} has no column {self.column!r}; its columns are: {', '.join(schema.names)}")
        return tuple(str(text) for text in pq.read_table(path, columns=[self.column])[self.column].to_pylist() if text)

    def conditions(self, seed: int, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array([generator(seed, i, "condition").integers(len(self._all)) for i in indices], dtype=np.int64)

    def texts(self, conditions: Sequence[int]) -> list[str]:
        """The prompts of these numbers."""
        return [self._all[number] for number in conditions]


DATASET = Prompts
