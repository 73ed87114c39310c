"""Writes the report of ``bespoke distil``: theta beside the best fixed solver, its numbers, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.metrics.base import shown_db
from orchestrator.models.facts import ModelFacts
from orchestrator.progress import Note, note
from orchestrator.reports.bill import bill_picture
from orchestrator.reports.curves import LEARNED_COLOURS
from orchestrator.reports.drawing.style import QUIET, tidy
from orchestrator.reports.drawing.theta import draw_theta
from orchestrator.reports.folder import Picture, ReportFolder
from orchestrator.reports.gallery import GROUND_TRUTH, Entry, Panel
from orchestrator.reports.sound import players
from orchestrator.reports.tables import Cell, Table
from orchestrator.results.bill import COLUMNS, Bill, guided
from orchestrator.results.truth import Truth
from solvers.ns import NSSolver
from solvers.theta import ThetaArtifact

COLUMNS_OF_TABLE = ("NFE", "theta (dB)", "best fixed solver (dB)", "gain (dB)", "start (dB)", "evaluations", "ended")


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The theta of one NFE, as a report shows it. PSNRs are means over the validation pairs, in dB.

    Attributes:
        nfe: Number of velocity evaluations.
        theta: theta.
        file: Name of its file.
        psnr_db: PSNR of theta.
        fixed_name, fixed: The best fixed solver, with its grid.
        fixed_psnr_db: Its PSNR.
        start_name, start_psnr_db: The solver that the distillation started from, and its PSNR.
        history: Velocity evaluations spent in all, and PSNR of theta, at each validation.
        pairs: Names of the validation pairs, by guidance scale.
        status: Why the distillation ended.
        notes: What a reader should know, in sentences.
    """

    nfe: int
    theta: ThetaArtifact
    file: str
    psnr_db: float
    fixed_name: str
    fixed: NSSolver
    fixed_psnr_db: float
    start_name: str
    start_psnr_db: float
    history: Sequence[tuple[int, float]]
    pairs: Mapping[float, str]
    status: str
    notes: Sequence[str]

    @property
    def evaluations(self) -> int:
        """Velocity evaluations that had been spent in all when theta was done."""
        return self.history[-1][0] if self.history else 0

    def numbers(self) -> dict[str, Any]:
        """The entry in ``table.json``."""
        return {
            "nfe": self.nfe,
            "theta": self.file,
            "psnr_db": self.psnr_db,
            "best_fixed": self.fixed_name,
            "best_fixed_psnr_db": self.fixed_psnr_db,
            "start": self.start_name,
            "start_psnr_db": self.start_psnr_db,
            "psnr_db_by_guidance_scale": {f"{scale:g}": value for scale, value in self.by_scale.items()},
            "evaluations": self.evaluations,
            "status": self.status,
            "notes": list(self.notes),
            "history": [list(entry) for entry in self.history],
        }

    @property
    def by_scale(self) -> dict[float, float]:
        """PSNR at each guidance scale of a range; empty for a single scale."""
        return dict(self.theta.validation_psnr_db_by_scale)

    def scales_sentence(self) -> str:
        """PSNR at each guidance scale of a range; empty for a single scale."""
        listed = ", ".join(f"{shown_db(value, 2)} at {scale:g}" for scale, value in self.by_scale.items())
        return f"PSNR of theta in dB by guidance scale: {listed}" if listed else ""

    def entries(self, scale: float) -> list[Entry]:
        """Ground truth, theta and the best fixed solver, to be sampled at a guidance scale."""
        theta = self.theta.at(guidance_scale=scale)
        return [
            (GROUND_TRUTH, None, None),
            ("theta", theta.solver.flat().numpy(), theta.validation_psnr_db),
            (self.fixed_name, self.fixed.flat().numpy(), None if self.by_scale else self.fixed_psnr_db),
        ]


def table_of(learned: Sequence[Learned]) -> Table:
    """theta beside the best fixed solver and the start, a row per NFE."""
    rows = []
    for one in learned:
        better = one.psnr_db > one.fixed_psnr_db
        rows.append(
            (
                Cell(str(one.nfe)),
                Cell(shown_db(one.psnr_db, 2), bold=better),
                Cell(f"{shown_db(one.fixed_psnr_db, 2)} ({one.fixed_name})", bold=not better),
                Cell(f"{one.psnr_db - one.fixed_psnr_db:+.2f}".replace("-", "−")),
                Cell(f"{shown_db(one.start_psnr_db, 2)} ({one.start_name})"),
                Cell(f"{one.evaluations:,}"),
                Cell(one.status),
            )
        )
    notes = tuple(f"NFE {one.nfe}: {sentence}." for one in learned for sentence in one.notes)
    mean = ", over a range of guidance scales the mean of its scales" if any(one.by_scale for one in learned) else ""
    explained = f"PSNR on the validation pairs{mean}; evaluations: all that had been spent when theta was done."
    return Table("theta and the best fixed solver", COLUMNS_OF_TABLE, tuple(rows), (explained, *notes))


def write_tables(folder: Path, learned: Sequence[Learned], bill: Bill) -> list[Path]:
    """Write ``table.md`` and ``table.json`` into an existing folder: what must not depend on any figure."""
    written = ReportFolder(folder)
    written.write("table.md", f"{table_of(learned).markdown()}\n{bill.markdown()}")
    content = {"thetas": [one.numbers() for one in learned], "bill": bill.metrics()}
    written.write("table.json", json.dumps(content, indent=1))
    return written.files


def write_report(
    folder: Path,
    config: ExperimentConfig,
    facts: ModelFacts,
    learned: Sequence[Learned],
    panels: Sequence[Panel],
    *,
    truths: Mapping[float, Truth],
    bill: Bill,
    configuration: Mapping[str, Any],
    announce: Note = note,
) -> list[Path]:
    """Write figures and ``report.html`` into ``folder``. A figure that cannot be drawn costs a sentence.

    Args:
        folder: An existing folder.
        config: The experiment.
        facts: The model.
        learned: The thetas.
        panels: Samples to show.
        truths: Facts about the ground truth of the validation pairs, by guidance scale.
        bill: What everything cost.
        configuration: What the report shows of the configuration.
        announce: Receives a note for each figure that is missing.

    Returns:
        The files written, the report last.
    """
    written = ReportFolder(folder, announce)
    sections = [_section(written, facts, one, panels) for one in learned]
    progress = written.picture("Validation PSNR against evaluations spent", "progress.png", partial(_progress, learned))
    written.page(
        "distillation.html.j2",
        config,
        facts,
        configuration=configuration,
        table=table_of(learned),
        sections=sections,
        progress=progress,
        truths=truths,
        guided=guided,
        bill=bill,
        bill_picture=bill_picture(written, bill),
        columns=COLUMNS,
    )
    return written.files


def _section(written: ReportFolder, facts: ModelFacts, one: Learned, panels: Sequence[Panel]) -> dict[str, Any]:
    """The report's section of one NFE: samples side by side, and theta itself."""
    return {
        "one": one,
        "galleries": [
            (
                panel.guidance_scale,
                written.samples(
                    panel,
                    facts,
                    f"samples_nfe{panel.nfe}_guidance{panel.guidance_scale:g}.png",
                    f"Guidance {panel.guidance_scale:g}: " if one.by_scale else "",
                ),
                players(panel),
            )
            for panel in panels
            if panel.nfe == one.nfe
        ],
        "thetas": [
            _theta_picture(written, one, scale) for scale in (one.theta.guidance_range or (one.theta.guidance_scale,))
        ],
    }


def _theta_picture(written: ReportFolder, one: Learned, scale: float) -> Picture:
    title = f"The numbers of theta, NFE {one.nfe}{guided(scale)}"
    solver = one.theta.at(guidance_scale=scale).solver
    return written.picture(
        title,
        f"theta_nfe{one.nfe}_guidance{scale:g}.png",
        lambda: draw_theta(solver, {one.fixed_name: one.fixed} if one.fixed.nfe <= 64 else {}),
    )


def _progress(learned: Sequence[Learned]) -> Figure:
    """Validation PSNR against evaluations spent in all; the best fixed solvers are dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for number, one in enumerate(learned):
        colour = LEARNED_COLOURS[number % len(LEARNED_COLOURS)]
        evaluations, psnr = zip(*one.history, strict=True) if one.history else ((), ())
        axes.plot(evaluations, psnr, ".-", color=colour, linewidth=1.6, label=f"theta, NFE {one.nfe}")
        axes.axhline(
            one.fixed_psnr_db, color=colour, linestyle="--", linewidth=1, label=f"{one.fixed_name}, NFE {one.nfe}"
        )
    tidy(axes, "velocity evaluations spent", "validation PSNR (dB)")
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, place: f"{value:,.0f}"))
    axes.tick_params(colors=QUIET)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    return figure
