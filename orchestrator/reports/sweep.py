"""Writes the report of a sweep: figures, tables and ``report.html``, from finished results and samples."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.metrics.base import Metric, shown_db
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.progress import Note, note
from orchestrator.reports.bill import bill_picture
from orchestrator.reports.curves import curves, training
from orchestrator.reports.folder import ReportFolder
from orchestrator.reports.gallery import Panel
from orchestrator.reports.sound import players
from orchestrator.results.bill import COLUMNS, Bill
from orchestrator.results.store import Result, Row
from orchestrator.results.truth import Truth

NO_TRUTHS: Mapping[float, Truth] = MappingProxyType({})


def write_tables(folder: Path, table: Sequence[Row]) -> list[Path]:
    """Write ``comparison.csv`` into an existing folder: what must not depend on any figure. Returns the files."""
    written = ReportFolder(folder)
    written.write("comparison.csv", comparison_csv(table))
    return written.files


def write_report(
    folder: Path,
    config: ExperimentConfig,
    facts: ModelFacts,
    specs: Iterable[PairSpec],
    table: Sequence[Row],
    results: Sequence[Result],
    panels: Sequence[Panel],
    announce: Note = note,
    *,
    truths: Mapping[float, Truth] = NO_TRUTHS,
    bill: Bill | None = None,
) -> list[Path]:
    """Write figures and ``report.html`` into ``folder``. A figure that cannot be drawn costs a sentence.

    Args:
        folder: An existing folder.
        config: The experiment.
        facts: The model.
        specs: Specs of all pair sets of the sweep.
        table: Rows of the comparison.
        results: Results of all points; those with a history are plotted.
        panels: Samples to show.
        announce: Receives a note for each figure that is missing.
        truths: Facts about the ground truth of the test pairs, by guidance scale; scores near its accuracy are marked.
        bill: What the results cost; None: the report has no bill.

    Returns:
        The files written, the report last.
    """
    written = ReportFolder(folder, announce)
    built: list[Metric] = [plugins.build("metrics", name) for name in config.metrics]
    metrics = {metric.column: metric for metric in built}
    sections = [
        _section(written, facts, scale, metrics, table, results, panels)
        for scale in sorted({r.guidance_scale for r in table})
    ]
    written.page(
        "report.html.j2",
        config,
        facts,
        pairs=sum(spec.count for spec in specs),
        sections=sections,
        units={column: metric.heading for column, metric in metrics.items()},
        not_finite=not_finite,
        shown_db=shown_db,
        mark=partial(mark, truths),
        truths=truths,
        near={row.guidance_scale for row in table if mark(truths, row)},
        bill=bill,
        bill_picture=bill_picture(written, bill),
        columns=COLUMNS,
    )
    return written.files


def _section(
    written: ReportFolder,
    facts: ModelFacts,
    scale: float,
    metrics: dict[str, Metric],
    table: Sequence[Row],
    results: Sequence[Result],
    panels: Sequence[Panel],
) -> dict[str, Any]:
    """The report's section for one guidance scale: its rows, and its figures."""
    part = [row for row in table if row.guidance_scale == scale]
    columns = list(part[0].metrics)
    histories = [r for r in results if r.history and r.point["guidance_scale"] == scale]
    suffix = f"guidance{scale:g}"
    return {
        "scale": scale,
        "nfes": sorted({row.nfe for row in part}),
        "summary": summary(part),
        "rows": sorted(part, key=lambda row: (row.nfe, -row.metrics["psnr_db"])),
        "columns": columns,
        "curves": [
            written.picture(
                f"{metrics[c].heading} against NFE", f"{c}_vs_nfe_{suffix}.png", partial(curves, part, metrics[c])
            )
            for c in columns
        ],
        "training": written.picture("Distillation", f"training_{suffix}.png", partial(training, histories))
        if histories
        else None,
        "galleries": [
            (written.samples(p, facts, f"samples_{suffix}_nfe{p.nfe}.png"), players(p))
            for p in panels
            if p.guidance_scale == scale
        ],
    }


def summary(table: Sequence[Row]) -> list[dict[str, Any]]:
    """PSNR by solver and NFE: learned solvers first, each group from the strongest down; the best per NFE is marked."""
    by_name: dict[tuple[str, str], dict[int, Row]] = {}
    for row in table:
        by_name.setdefault((row.name, row.kind), {})[row.nfe] = row
    best = {nfe: max(r.metrics["psnr_db"] for r in table if r.nfe == nfe) for nfe in {r.nfe for r in table}}
    # Families that run at only a few NFEs would be ranked by that alone, so only the NFEs shared by all count.
    shared = set.intersection(*(set(cells) for cells in by_name.values())) if by_name else set()
    lines: list[dict[str, Any]] = []
    for (name, kind), cells in by_name.items():
        marked = {nfe: row.metrics["psnr_db"] == best[nfe] for nfe, row in cells.items()}
        mean = float(np.mean([row.metrics["psnr_db"] for nfe, row in cells.items() if nfe in shared or not shared]))
        lines.append({"name": name, "kind": kind, "cells": cells, "best": marked, "mean": mean})
    return sorted(lines, key=lambda line: (line["kind"] != "learned", -line["mean"]))


def comparison_csv(table: Sequence[Row]) -> str:
    """The comparison as CSV, one line per solver."""
    columns = list(table[0].metrics) if table else []
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow(["solver", "kind", "nfe", "guidance_scale", "sigma0", "detail", *columns, "seeds"])
    for row in table:
        fields = [row.name, row.kind, row.nfe, f"{row.guidance_scale:g}", f"{row.sigma0:g}", row.detail]
        sheet.writerow([*fields, *(f"{row.metrics[c]:.4f}" for c in columns), row.seeds])
    return text.getvalue()


def mark(truths: Mapping[float, Truth], row: Row | None) -> str:
    """The mark of a row's PSNR if it is near the accuracy of its ground truth, else nothing."""
    truth = None if row is None else truths.get(row.guidance_scale)
    return "" if truth is None or row is None else truth.mark(row.metrics["psnr_db"])


def markdown_table(table: Sequence[Row], truths: Mapping[float, Truth] = NO_TRUTHS) -> str:
    """PSNR by solver and NFE as Markdown tables, one per guidance scale; those near the truth's accuracy are marked."""
    lines = []
    for scale in sorted({row.guidance_scale for row in table}):
        part = [row for row in table if row.guidance_scale == scale]
        nfes = sorted({row.nfe for row in part})
        lines += [f"PSNR (dB), guidance {scale:g}", "", "| solver | " + " | ".join(f"NFE {n}" for n in nfes) + " |"]
        lines.append("|---" * (len(nfes) + 1) + "|")
        for entry in summary(part):
            cells = [_cell(entry, nfe, truths) for nfe in nfes]
            lines.append(f"| {html.escape(entry['name'])} | " + " | ".join(cells) + " |")
        if any(mark(truths, row) for row in part):
            lines += ["", f"{truths[scale].footnote()}."]
        lines.append("")
    return "\n".join(lines)


def not_finite(row: Row) -> str:
    """`` (3 not finite)`` if samples had to be left out of the mean, otherwise an empty string."""
    return f" ({row.not_finite} not finite)" if row.not_finite else ""


def _cell(entry: dict[str, Any], nfe: int, truths: Mapping[float, Truth]) -> str:
    row = entry["cells"].get(nfe)
    if row is None:
        return "—"
    error = f" ± {row.stderr['psnr_db']:.2f}" if row.seeds > 1 else ""
    text = f"{shown_db(row.metrics['psnr_db'], 1)}{mark(truths, row)}{error}{not_finite(row)}"
    return f"**{text}**" if entry["best"][nfe] else text
