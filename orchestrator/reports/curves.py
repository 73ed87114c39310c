"""Figures of a sweep's numbers: metrics against NFE, and validation PSNR against iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from orchestrator.metrics.base import EXACT_DB, Metric
from orchestrator.reports.drawing.style import tidy
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
