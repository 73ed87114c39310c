"""Row access to one column of Parquet files, holding one row group in memory at a time."""

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
    """A column of several Parquet files as one sequence; fastest when rows are read roughly in order.

    Args:
        files: Parquet files; their rows are concatenated in this order.
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
        """The value of a row, as a Python object."""
        if not 0 <= index < self.rows:
            raise IndexError(index)
        place = int(np.searchsorted(self._firsts, index, side="right")) - 1
        group = self._groups[place]
        if place != self._place:
            self._held = None  # freed before the next group is read, so that two are never held
            table = pq.ParquetFile(group.file).read_row_group(group.group, columns=[self.column])
            self._place, self._held = place, table[self.column]
        return self._held[index - group.first].as_py()
