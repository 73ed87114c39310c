"""Text prompts, the conditioning of text-to-image and text-to-audio models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from orchestrator.datasets._parquet import check_columns, texts
from orchestrator.datasets.base import Dataset, IntArray, uniform
from orchestrator.files import read_text
from orchestrator.plugins import PATH


@dataclass(frozen=True)
class Prompts(Dataset):
    """Prompts drawn uniformly from a list, a text file (one per line) or a Parquet column.

    A condition is the number of a prompt; the model adapter encodes its text (:meth:`texts`).

    Attributes:
        prompts: List of prompts; used if no file is set.
        file: A ``.txt`` or ``.parquet`` file of prompts, used instead of the list.
        column: Column of the Parquet file.
        sha256: Expected sha256 of the file's bytes, if set; a file that differs is refused, so that pairs made from it
            are never confused with those of another version.

    Raises:
        ValueError: The file holds no prompts, is missing, of another format or without the column.
    """

    prompts: tuple[str, ...] = ("a photograph of a cat", "a painting of a lighthouse at dusk", "a bowl of ripe peaches")
    file: str | None = field(default=None, metadata=PATH)
    column: str = "prompt"
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.sha256 is not None:
            raise ValueError("sha256 applies to a file, but no file is set; remove it")
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts must be a list of strings, got {self.prompts!r}")
        if not self._all:
            raise ValueError(f"{self.file or 'the list'} holds no prompts; add at least one")

    @cached_property
    def _all(self) -> tuple[str, ...]:
        return tuple(self.prompts) if self.file is None else self._read(Path(self.file))

    def _read(self, path: Path) -> tuple[str, ...]:
        if not path.is_file():
            raise ValueError(f"no prompts file at {path}; set file to an existing .txt or .parquet file")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            raise ValueError(f"{path} has sha256 {digest}, not {self.sha256}; use the file the pairs were made from")
        if path.suffix == ".txt":
            return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
        if path.suffix != ".parquet":
            raise ValueError(f"prompts file {path} is neither .txt (one prompt per line) nor .parquet")
        check_columns(path, [self.column])
        return tuple(text for text in texts(path, self.column) if text)

    def conditions(self, seed: int, indices: Sequence[int]) -> IntArray:
        return uniform(seed, indices, len(self._all))

    def conditioned_on(self) -> Iterable[str]:
        return self._all

    def texts(self, conditions: Sequence[int]) -> list[str]:
        """The prompts with these numbers."""
        return [self._all[number] for number in conditions]


DATASET = Prompts
