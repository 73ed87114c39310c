"""Writes the files of an evaluation: tables in three formats, figures of samples, sound, and ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.evaluation.cases import Score
from orchestrator.models.facts import ModelFacts
from orchestrator.progress import Note, note
from orchestrator.reports.drawing.style import tidy
from orchestrator.reports.folder import Picture, ReportFolder
from orchestrator.reports.gallery import Panel
from orchestrator.reports.sound import Players, players, wav
from orchestrator.reports.tables import Table, heading, in_units, to_parquet


def write_tables(folder: Path, scores: Sequence[Score], tables: Sequence[Table]) -> list[Path]:
    """Write ``scores.parquet``, ``tables.md`` and ``tables.tex`` into an existing folder. Returns the files."""
    written = ReportFolder(folder)
    written.write("scores.parquet", to_parquet(scores))
    written.write("tables.md", "\n".join(table.markdown() for table in tables))
    written.write("tables.tex", "\n".join(table.latex() for table in tables))
    return written.files


def write_evaluation(
    folder: Path,
    config: ExperimentConfig,
    facts: ModelFacts,
    scores: Sequence[Score],
    tables: Sequence[Table],
    panels: Sequence[tuple[str, Panel]],
    announce: Note = note,
) -> list[Path]:
    """Write figures, sound and, last, ``report.html``. A figure that cannot be drawn costs a sentence.

    Args:
        folder: An existing folder.
        config: The experiment.
        facts: The model.
        scores: All scores.
        tables: Tables of the scores.
        panels: (dataset, panel) pairs; a panel has the samples of every solver from the same noise.
        announce: Receives a note for each figure that is missing.

    Returns:
        The files written.
    """
    written = ReportFolder(folder, announce)
    written.page(
        "evaluation.html.j2",
        config,
        facts,
        tables=tables,
        panels=[_gallery(written, facts, dataset, panel) for dataset, panel in panels],
        curves=_curves(written, scores),
    )
    return written.files


def _curves(written: ReportFolder, scores: Sequence[Score]) -> list[Picture]:
    """Curves for each dataset and guidance scale with at least two NFEs."""
    curves = []
    for dataset, scale in sorted({(s.case.dataset, s.case.solver.guidance_scale) for s in scores}):
        part = [s for s in scores if (s.case.dataset, s.case.solver.guidance_scale) == (dataset, scale)]
        if len({s.case.solver.nfe for s in part} - {None}) >= 2:  # a curve with one NFE adds nothing to the table
            name = f"scores_{dataset}_guidance{scale:g}.png"
            title = f"{dataset}{_guided(scale)}: scores against NFE"
            curves.append(written.picture(title, name, partial(score_curves, part)))
    return curves


def _guided(scale: float) -> str:
    return "" if scale == 1 else f", guidance scale {scale:g}"


def _gallery(written: ReportFolder, facts: ModelFacts, dataset: str, panel: Panel) -> tuple[Picture, list[Players]]:
    """A panel's figure and players of sound; sound is also written as WAV files."""
    name = f"samples_{dataset}_guidance{panel.guidance_scale:g}_nfe{panel.nfe}"
    picture = written.samples(panel, facts, f"{name}.png", f"{dataset}{_guided(panel.guidance_scale)}: ")
    for strip in panel.strips:
        if strip.waves is not None and strip.rate is not None:
            solver = "".join(letter if letter.isalnum() else "-" for letter in strip.name)
            written.write(f"{name}_{solver}.wav", wav(np.concatenate(list(strip.waves)), strip.rate))
    return picture, players(panel)


def score_curves(scores: Sequence[Score]) -> Figure:
    """Plot every metric against NFE for one dataset and guidance scale: one line per solver, ground truth dashed."""
    metrics = list(dict.fromkeys(heading(score) for score in scores))
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.4), squeeze=False)
    solvers = list(dict.fromkeys(s.case.solver.name for s in scores if s.case.solver.kind != "ground truth"))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(solvers)}
    for axis, metric in zip(axes[0], metrics, strict=True):
        finite = [s for s in scores if heading(s) == metric and np.isfinite(s.summary.mean)]
        for name in solvers:
            points = sorted((s for s in finite if s.case.solver.name == name), key=lambda s: s.nfe)
            learned = any(s.case.solver.kind == "theta" for s in points)
            axis.errorbar(
                [s.nfe for s in points],
                [in_units(s)[0] for s in points],
                yerr=[in_units(s)[1] if np.isfinite(s.summary.stderr) else 0 for s in points],
                color=colours[name],
                label=name,
                marker="o" if learned else ".",
                linewidth=2.5 if learned else 1.2,
                capsize=2,
            )
        for score in finite:
            if score.case.solver.kind == "ground truth" and not score.is_exact:
                axis.axhline(in_units(score)[0], color="grey", linestyle="--", linewidth=1, label="ground truth")
        axis.set_xticks(sorted({int(s.nfe) for s in finite if s.case.solver.kind != "ground truth"}))
        tidy(axis, "velocity evaluations (NFE)", metric)
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
