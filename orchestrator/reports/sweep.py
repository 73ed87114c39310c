"""Writes the report of a sweep: figures, tables and ``report.html``, from finished results and samples."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a cluster's head node has no display

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator import plugins
from orchestrator.audio.mel import LOUDEST, SILENCE
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.metrics.base import EXACT_DB, Metric, shown_db
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.reports.folder import ReportFolder
from orchestrator.reports.gallery import DIFFERENCE_GAIN, Panel
from orchestrator.reports.sound import players
from orchestrator.results.store import Result, Row

LEARNED_COLOURS = ("#c2185b", "#7b1fa2", "#e65100", "#00838f", "#5d4037", "#33691e")
#: tab10 without its grey, which the legend uses for line styles.
FIXED_COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "black",
    "tab:olive",
)


def write_report(
    folder: Path,
    config: ExperimentConfig,
    facts: ModelFacts,
    specs: Iterable[PairSpec],
    table: Sequence[Row],
    results: Sequence[Result],
    panels: Sequence[Panel],
) -> list[Path]:
    """Write ``comparison.csv``, figures and ``report.html`` into ``folder``.

    Args:
        folder: An existing folder.
        config: The experiment.
        facts: The model.
        specs: Specs of all pair sets of the sweep.
        table: Rows of the comparison.
        results: Results of all points; those with a history are plotted.
        panels: Samples to show.

    Returns:
        The files written, the report last.
    """
    written = ReportFolder(folder)
    written.write("comparison.csv", comparison_csv(table))  # first: no figure that fails may take it away
    built: list[Metric] = [plugins.build("metrics", name) for name in config.metrics]
    metrics = {metric.column: metric for metric in built}
    sections = [
        _section(written, scale, metrics, table, results, panels) for scale in sorted({r.guidance_scale for r in table})
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
    )
    return written.files


def _section(
    written: ReportFolder,
    scale: float,
    metrics: dict[str, Metric],
    table: Sequence[Row],
    results: Sequence[Result],
    panels: Sequence[Panel],
) -> dict[str, Any]:
    """The report's section for one guidance scale: its rows, and its figures in base64."""
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
            (metrics[c].heading, written.figure(curves(part, metrics[c]), f"{c}_vs_nfe_{suffix}.png")) for c in columns
        ],
        "training": written.figure(training(histories), f"training_{suffix}.png") if histories else None,
        "galleries": [
            (p.nfe, written.figure(gallery(p), f"samples_{suffix}_nfe{p.nfe}.png"), players(p))
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


def curves(table: Sequence[Row], metric: Metric) -> Figure:
    """Plot a metric against NFE: learned solvers bold, fixed families solid on their best grid, dashed on the common.

    Only the strongest solvers are drawn, as many as there are colours; the table has all of them. An infinite PSNR is
    not drawn.
    """
    column = metric.column
    figure, axes = plt.subplots(figsize=(8.2, 4.8))
    labels = _strongest(table, ("best grid", "common grid"), len(FIXED_COLOURS))
    colours = {label: FIXED_COLOURS[i % len(FIXED_COLOURS)] for i, label in enumerate(labels)}
    learned = _strongest(table, ("learned",), len(LEARNED_COLOURS))
    colours |= {label: LEARNED_COLOURS[i % len(LEARNED_COLOURS)] for i, label in enumerate(learned)}
    styles: dict[str, dict[str, Any]] = {
        "common grid": {"linestyle": "--", "linewidth": 0.9, "alpha": 0.45, "marker": "."},
        "best grid": {"linestyle": "-", "linewidth": 1.4, "marker": "."},
        "start": {"linestyle": ":", "linewidth": 2, "marker": "."},
        "learned": {"linestyle": "-", "linewidth": 3, "marker": "o", "zorder": 5},
    }
    for kind, style in styles.items():
        if kind == "start" and len(learned) > 2:
            continue  # the starts are among the fixed solvers
        for label in learned if kind in ("learned", "start") else labels:
            points = sorted((r for r in table if r.kind == kind and r.label == label), key=lambda r: r.nfe)
            if not points:
                continue
            x = [r.nfe for r in points]
            y = [
                math.nan if column == "psnr_db" and r.metrics[column] >= EXACT_DB else r.metrics[column] for r in points
            ]
            legend = {"learned": label, "start": f"start of {label}", "best grid": label, "common grid": None}[kind]
            axes.errorbar(
                x, y, yerr=[r.stderr[column] for r in points], color=colours[label], label=legend, capsize=2, **style
            )
    axes.plot([], [], color="grey", label="best grid", **styles["best grid"])
    axes.plot([], [], color="grey", label="common grid", **styles["common grid"])
    tidy(axes, "velocity evaluations (NFE)", metric.heading)
    axes.set_xticks(sorted({row.nfe for row in table}))
    if metric.log_axis:
        axes.set_yscale("log")
    # Same order as in the figure: learned solvers on top, line styles at the bottom.
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _strongest(table: Sequence[Row], kinds: Sequence[str], count: int) -> list[str]:
    """Labels of the ``count`` solvers of these kinds with the highest mean PSNR over their NFEs, sorted by label."""
    scores: dict[str, list[float]] = {}
    for row in table:
        if row.kind in kinds:
            scores.setdefault(row.label, []).append(row.metrics["psnr_db"])
    return sorted(sorted(scores, key=lambda label: -float(np.mean(scores[label])))[:count])


def training(results: Sequence[Result]) -> Figure:
    """Plot validation PSNR against iteration: one line per trial, one colour per NFE; Levenberg-Marquardt dashed.

    With several methods the axis is logarithmic from 1, for few Levenberg-Marquardt and thousands of Adam iterations.
    """
    figure, axes = plt.subplots(figsize=(8.2, 3.8))
    nfes = sorted({r.point["nfe"] for r in results})
    palette = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(nfes)))
    for result in sorted(results, key=lambda r: r.point["nfe"]):
        colour = palette[nfes.index(result.point["nfe"])]
        steps, psnr = zip(*result.history, strict=True)
        style = "--" if result.point.get("method") == "levenberg_marquardt" else "-"
        axes.plot(steps, psnr, style, color=colour, linewidth=1.2, alpha=0.8)
    for nfe, colour in zip(nfes, palette, strict=True):
        axes.plot([], [], color=colour, label=f"NFE {nfe}", linewidth=2)
    if len({result.point.get("method") for result in results}) > 1:
        axes.set_xscale("symlog", linthresh=1)
    tidy(axes, "iteration", "validation PSNR (dB)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def gallery(panel: Panel) -> Figure:
    """Draw the samples of all solvers from the same noise, each with its difference from ground truth below."""
    truth = panel.strips[0].samples
    count = len(truth)
    rows = 2 * len(panel.strips) - 1
    width = 0.72 * truth.shape[-1] / truth.shape[-2]
    figure, grid = plt.subplots(
        rows,
        count,
        figsize=(width * count + 2.2, 0.74 * rows),
        squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.08},
    )
    line = 0
    for strip in panel.strips:
        title = strip.name if strip.psnr_db is None else f"{strip.name}\n{shown_db(strip.psnr_db, 1)} dB"
        _strip(grid[line], [_picture(sample) for sample in strip.samples], title)
        line += 1
        if strip is not panel.strips[0]:
            differences = [_difference(sample) for sample in DIFFERENCE_GAIN * (strip.samples - truth)]
            _strip(grid[line], differences, f"difference ×{DIFFERENCE_GAIN}", "coolwarm")
            line += 1
    return figure


def _strip(
    axes: npt.NDArray[Any], pictures: Sequence[npt.NDArray[np.float32]], title: str, colours: str = "gray"
) -> None:
    for axis, picture in zip(axes, pictures, strict=True):
        axis.imshow(picture, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)


def _picture(sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A sample as imshow expects it: (H, W) in [-1, 1] or (H, W, 3) in [0, 1]; low mel frequencies at the bottom."""
    if sample.ndim == 2:
        return np.clip(2 * (sample[::-1] - SILENCE) / (LOUDEST - SILENCE) - 1, -1, 1)
    if sample.ndim == 3 and sample.shape[0] == 3:
        return np.clip(sample.transpose(1, 2, 0) / 2 + 0.5, 0, 1)
    return np.clip(sample.reshape(sample.shape[-2:]), -1, 1)


def _difference(difference: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A difference as imshow expects it; 0 is the middle of the colour scale also for mel frames."""
    return np.clip(difference[::-1], -1, 1) if difference.ndim == 2 else _picture(difference)


def tidy(axes: Axes, x: str, y: str) -> None:
    """Set axis labels and a faint grid, and hide the upper and right spines."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def markdown_table(table: Sequence[Row]) -> str:
    """PSNR by solver and NFE as Markdown tables, one per guidance scale."""
    lines = []
    for scale in sorted({row.guidance_scale for row in table}):
        part = [row for row in table if row.guidance_scale == scale]
        nfes = sorted({row.nfe for row in part})
        lines += [f"PSNR (dB), guidance {scale:g}", "", "| solver | " + " | ".join(f"NFE {n}" for n in nfes) + " |"]
        lines.append("|---" * (len(nfes) + 1) + "|")
        for entry in summary(part):
            cells = [_cell(entry, nfe) for nfe in nfes]
            lines.append(f"| {html.escape(entry['name'])} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def not_finite(row: Row) -> str:
    """`` (3 not finite)`` if samples had to be left out of the mean, otherwise an empty string."""
    return f" ({row.not_finite} not finite)" if row.not_finite else ""


def _cell(entry: dict[str, Any], nfe: int) -> str:
    row = entry["cells"].get(nfe)
    if row is None:
        return "—"
    error = f" ± {row.stderr['psnr_db']:.2f}" if row.seeds > 1 else ""
    text = f"{shown_db(row.metrics['psnr_db'], 1)}{error}{not_finite(row)}"
    return f"**{text}**" if entry["best"][nfe] else text
