"""A column of Parquet files by row, with one row group in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq


class _RowGroup(NamedTuple):
    file: Path
    group: int
    first: int


class RowGroups:
    """A column whose rows are asked for in about their order.

    Args:
        files: Parquet files, one after another.
        column: Name of the column.
    """

    def __init__(self, files: Sequence[Path], column: str):
        self.column = column
        self.rows = 0
        self._groups: list[_RowGroup] = []
        for file in files:
            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self._groups.append(_RowGroup(file, group, self.rows))
                self.rows += metadata.row_group(group).num_rows
        self._firsts = [group.first for group in self._groups]
        self._place: int | None = None
        self._held: Any = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        """The value of a row, as Python has it."""
        if not 0 <= index < self.rows:
            raise IndexError(index)
        place = int(np.searchsorted(self._firsts, index, side="right")) - 1
        group = self._groups[place]
        if place != self._place:
            self._held = None  # before the next is read: one is held, never two
            table = pq.ParquetFile(group.file).read_row_group(group.group, columns=[self.column])
            self._place, self._held = place, table[self.column]
        return self._held[index - group.first].as_py()
