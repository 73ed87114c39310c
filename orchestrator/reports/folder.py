"""The folder that a report is written into."""

from __future__ import annotations

import base64
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


class ReportFolder:
    """Writes the files of a report and lists them in the order they were written.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[Path] = []

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file; text is encoded as UTF-8."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.files.append(path)

    def figure(self, figure: Figure, name: str) -> str:
        """Write a figure as PNG, close it, and return the file in base64, to be embedded in HTML."""
        path = self.folder / name
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        self.files.append(path)
        return base64.b64encode(path.read_bytes()).decode()
