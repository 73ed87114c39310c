"""How results are shown in a notebook: tables as HTML, and pictures as PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLES = {"refused": "color:#b00020;font-weight:600", "noted": "color:#9a6700", "best": "font-weight:600"}
"""CSS of rows by their meaning."""


class Picture:
    """A PNG, which a notebook shows.

    Args:
        png: Its bytes.
    """

    def __init__(self, png: bytes):
        self.png = png

    def save(self, path: str | Path) -> None:
        """Write it to a .png file."""
        Path(path).write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png

    def html(self) -> str:
        """An image element that holds it."""
        return f'<img style="max-width:100%" src="data:image/png;base64,{base64.b64encode(self.png).decode()}">'

    def __repr__(self) -> str:
        return f"Picture({len(self.png):,} bytes; .save(path) writes it)"


def html_table(
    rows: Iterable[Sequence[Any]], headings: Sequence[str] = (), title: str = "", styles: Sequence[str] = ()
) -> str:
    """A table as HTML; every value is escaped.

    Args:
        rows: Cells of each row.
        headings: Headings of the columns.
        title: Line above the table.
        styles: Meaning of each row, a key of :data:`STYLES` or empty; none by default.
    """
    lines = [f"<p><b>{html.escape(title)}</b></p>"] if title else []
    lines.append('<table style="text-align:left">')
    if headings:
        lines.append("<tr>" + "".join(f"<th>{html.escape(str(one))}</th>" for one in headings) + "</tr>")
    for number, row in enumerate(rows):
        style = STYLES.get(styles[number], "") if number < len(styles) else ""
        cells = "".join(f'<td style="text-align:left">{html.escape(str(cell))}</td>' for cell in row)
        lines.append(f'<tr style="{style}">{cells}</tr>')
    return "\n".join([*lines, "</table>"])
