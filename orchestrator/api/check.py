"""The examination of a model, as a notebook shows it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from orchestrator.api.display import Picture, html_table
from orchestrator.hosts.teacher.detectors import readings
from orchestrator.hosts.teacher.findings import Finding
from orchestrator.reports.teacher import draw_teacher
from sweeps.examination import Examination


class Check:
    """What the examination of a model found.

    Attributes:
        examination: The evidence, and what it was measured on.
        findings: What is wrong; empty if nothing is.
        is_refused: Whether a distillation would refuse the model.
    """

    def __init__(self, name: str, examination: Examination):
        self.name, self.examination = name, examination
        self.findings: list[Finding] = examination.findings
        self.is_refused = any(finding.severity == "refused" for finding in self.findings)

    @property
    def title(self) -> str:
        evidence = self.examination.evidence
        count = len(self.findings)
        found = "nothing wrong" if not count else f"{count} finding{'s' * (count > 1)}"
        return (
            f"{self.name}, {self.examination.subject.label}: {found} in {evidence.evaluations:.0f} evaluations of "
            f"{evidence.samples} samples"
        )

    def plot(self) -> Picture:
        """The trajectories, and the network as a denoiser."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "teacher.png"
            draw_teacher(file, f"{self.name}, {self.examination.subject.label}", self.examination.evidence)
            return Picture(file.read_bytes())

    def __repr__(self) -> str:
        return "\n".join([self.title, *(f"  {finding.severity}: {finding}" for finding in self.findings)])

    def _repr_html_(self) -> str:
        rows, styles = [], []
        for reading in readings(self.examination.evidence):
            finding = reading.finding
            value = "—" if reading.value is None else f"{reading.value:.3g}"
            verdict = "" if reading.value is None else "good" if finding is None else finding.severity
            rows.append((reading.name, reading.quantity, value, reading.limit, verdict))
            styles.append("" if finding is None else finding.severity)
        table = html_table(rows, ("detector", "measured", "value", "limits", "verdict"), self.title, styles)
        found = html_table([(one.severity, str(one)) for one in self.findings]) if self.findings else ""
        return table + found + self.plot().html()
