"""The folder that a report is written into, and its page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import Failure
from orchestrator.log import record
from orchestrator.models.facts import ModelFacts
from orchestrator.progress import Note, counted, note
from orchestrator.reports.drawing.kinds import DRAWINGS
from orchestrator.reports.gallery import Panel
from orchestrator.uris import values_without_secrets


class Picture(NamedTuple):
    """A figure of a report, or why it is missing.

    Attributes:
        title: What it shows.
        data: The PNG file in base64, to be embedded in HTML; None if it is missing.
        missing: A sentence that says why; None if it is not.
    """

    title: str
    data: str | None
    missing: str | None = None


class ReportFolder:
    """Writes the files of a report and lists them in the order they were written.

    Args:
        folder: An existing folder.
        announce: Receives a note for each picture that is missing.
    """

    def __init__(self, folder: Path, announce: Note = note):
        self.folder, self.announce = folder, announce
        self.files: list[Path] = []

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file; text is encoded as UTF-8."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.files.append(path)

    def picture(self, title: str, name: str, draw: Callable[[], Figure]) -> Picture:
        """Draw a figure and write it as PNG. A figure that cannot be drawn costs a sentence and a note."""
        path, shown_before = self.folder / name, set(plt.get_fignums())
        try:
            draw().savefig(path, dpi=130, bbox_inches="tight")
        except Exception as error:
            path.unlink(missing_ok=True)
            failure = Failure.of(error)
            record(f"figure {name}", failure.details)
            return self._missing(title, f"This figure could not be drawn: {failure.reason}.")
        finally:
            for number in set(plt.get_fignums()) - shown_before:
                plt.close(number)
        self.files.append(path)
        return Picture(title, base64.b64encode(path.read_bytes()).decode())

    def samples(self, panel: Panel, facts: ModelFacts, name: str, where: str = "") -> Picture:
        """Draw the samples of a panel, in the way of the model's kind.

        Args:
            panel: The samples.
            facts: The model.
            name: Name of the file.
            where: Beginning of the title, e.g. the dataset.
        """
        drawing = DRAWINGS[facts.kind]
        title = f"{where}{'samples' if where else 'Samples'} at NFE {panel.nfe} from the same noise"
        if panel.missing is not None:
            return self._missing(title, f"These samples could not be made: {panel.missing}.")
        return self.picture(f"{title}, {drawing.caption}", name, lambda: drawing.draw(panel, facts))

    def _missing(self, title: str, sentence: str) -> Picture:
        self.announce(f"{title}: {sentence[0].lower()}{sentence[1:]}")
        return Picture(title, None, sentence)

    def page(
        self,
        template: str,
        config: ExperimentConfig,
        facts: ModelFacts,
        *,
        configuration: Mapping[str, Any] | None = None,
        **content: Any,
    ) -> None:
        """Write ``report.html``, last of all files, from a template of this package.

        Args:
            template: Name of the template.
            config: The experiment.
            facts: Its model.
            configuration: What the page shows as its configuration; None: all of the experiment.
            content: Further variables of the template.
        """
        values = config.model_dump(mode="json") if configuration is None else dict(configuration)
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
            counted=counted,
            configuration=yaml.safe_dump(values_without_secrets(values), sort_keys=False),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **content,
        )
        self.write("report.html", text)
