"""Columns of Parquet files: checked labels and texts, and row access that holds one row group in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def check_columns(file: Path, columns: Iterable[str | None]) -> None:
    """Refuse a file without these columns; None stands for a column that is not used.

    Raises:
        ValueError: The file is not a Parquet file, or lacks a column; lists those that it has.
    """
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}; replace it") from error
    for column in columns:
        if column is not None and column not in names:
            raise ValueError(f"{file} has no column {column!r}; its columns are: {', '.join(names)}")


def texts(file: Path, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        ValueError: The column is not of texts, or a row has none; names the row.
    """
    values = _values(file, column, "text")
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(f"column {column!r} of {file} holds {values.type}, not texts; choose another column")
    return [str(text) for text in values.to_pylist()]


def labels(file: Path, column: str) -> npt.NDArray[np.int64]:
    """The class labels of a column, (rows,): whole numbers from 0.

    Raises:
        ValueError: The column is not of numbers, or a row has no label, a fraction or a negative one; names the row.
    """
    values = _values(file, column, "label")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(f"column {column!r} of {file} holds {values.type}, not class labels; choose another column")
    numbers = values.to_numpy()
    wrong = np.flatnonzero(~((numbers >= 0) & (numbers == np.floor(numbers)) & np.isfinite(numbers)))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} of {file} has {numbers[wrong[0]]:g} in column {column!r}, which is not a class label: "
            f"labels are whole numbers from 0; correct or remove the row"
        )
    return numbers.astype(np.int64)


def _values(file: Path, column: str, what: str) -> pa.ChunkedArray:
    values = pq.read_table(file, columns=[column])[column]
    if values.null_count:
        row = values.is_null().to_numpy().argmax()
        raise ValueError(f"row {row} of {file} has no {what}: column {column!r} is null; correct or remove the row")
    return values


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
