"""The folder that a report is written into, and its page."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.models.facts import ModelFacts
from orchestrator.reports.gallery import DIFFERENCE_GAIN
from orchestrator.uris import values_without_secrets


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

    def page(self, template: str, config: ExperimentConfig, facts: ModelFacts, **content: Any) -> None:
        """Write ``report.html``, last of all files, from a template of this package."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        text = environment.get_template(template).render(
            config=config,
            facts=facts,
            gain=DIFFERENCE_GAIN,
            configuration=yaml.safe_dump(values_without_secrets(config.model_dump(mode="json")), sort_keys=False),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **content,
        )
        self.write("report.html", text)
