"""``bespoke check``: the teacher's examination alone, with a figure."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import Failure
from orchestrator.models.facts import ModelFacts
from orchestrator.progress import note
from orchestrator.reports.teacher import draw_teacher
from orchestrator.storage import Storage
from sweeps.examination import Examination, examine, subjects
from sweeps.opening import open_session
from sweeps.space import check_pairs


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Result of a check.

    Attributes:
        facts: Facts of the model.
        examinations: One per guidance scale.
        figures: Locations of their figures.
    """

    facts: ModelFacts
    examinations: list[Examination]
    figures: list[str]

    @property
    def is_refused(self) -> bool:
        return any(finding.severity == "refused" for one in self.examinations for finding in one.findings)


def run_check(config: ExperimentConfig, *, address: str | None, wait: bool) -> Checked:
    """Examine the teacher of an experiment at each of its guidance scales, and draw what was measured.

    Args:
        config: A checked configuration.
        address: Ray cluster; None: the model runs in this process, without Ray.
        wait: Whether to wait for another process that uses the same folder.

    Raises:
        UserError: The configuration cannot work, or its training pairs cannot determine what is learned.
    """
    with open_session(config, address=address, wait=wait, tracked=False, command="check") as session:
        storage, pool, facts = session.storage, session.pool, session.facts
        check_pairs(config, facts.shape)
        found = subjects(session.specs.values())
        examinations = [examine(storage, pool, facts, subject) for subject in found]
    return Checked(facts=facts, examinations=examinations, figures=_draw(config, storage, facts, examinations))


def _draw(config: ExperimentConfig, storage: Storage, facts: ModelFacts, all_of_them: list[Examination]) -> list[str]:
    """Write a figure per examination to the experiment's folder; returns their locations."""
    locations = []
    with tempfile.TemporaryDirectory() as name:
        for examination in all_of_them:
            scale = examination.subject.guidance_scale
            file = Path(name) / f"teacher-guidance-{scale:g}.png"
            try:
                draw_teacher(file, f"{facts.name}, {examination.subject.label}", examination.evidence)
            except Exception as error:  # the findings are worth more than their picture
                note(f"the figure of guidance scale {scale:g} could not be drawn: {Failure.of(error).reason}")
                continue
            key = f"experiments/{config.name}/check/{file.name}"
            storage.write(key, file.read_bytes())
            locations.append(storage.location(key))
    return locations
