"""Table and figure of the comparison between solver and network distillation, from rows computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a cluster's head has no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from orchestrator.features.base import fid_column
from orchestrator.metrics.base import shown_db

MARKERS = "osD^vP*X"


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One method at one NFE.

    Attributes:
        method: Display name.
        nfe: Evaluations per sample; the mean for ground truth.
        psnr_db, psnr_stderr: PSNR to ground truth on the test noise; infinite for ground truth itself.
        fid: Frechet distance of the samples to real data.
        forwards, backwards: Network passes spent on producing it, counted per sample: training, validation, search,
            and the ground truth it learns from.
        training_set: Number of trajectories or real samples it learns from.
        parameters: Number of trained parameters.
        bytes: Size of the resulting file.
    """

    method: str
    nfe: float
    psnr_db: float
    psnr_stderr: float
    fid: float
    forwards: int = 0
    backwards: int = 0
    training_set: int = 0
    parameters: int = 0
    bytes: int = 0


def markdown_table(rows: Sequence[ComparisonRow], features: str, real: str) -> str:
    """The comparison as a Markdown table, with the best PSNR and distance of each NFE in bold.

    Args:
        rows: All rows, ground truth first.
        features: Name of the feature extractor.
        real: Unit of the training set of methods that learn from real data, e.g. 'real digits'.
    """
    columns = ("method", "NFE", "PSNR (dB)", fid_column(features), "forwards", "backwards", "training set", "trained")
    lines = ["| " + " | ".join((*columns, "bytes")) + " |", "|---" * 2 + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        peers = [other for other in rows if other.nfe == row.nfe]
        psnr = "—" if math.isinf(row.psnr_db) else f"{shown_db(row.psnr_db, 1)} ± {row.psnr_stderr:.2f}"
        fid = f"{row.fid:.3f}"
        if len(peers) > 1:
            psnr = f"**{psnr}**" if row.psnr_db == max(peer.psnr_db for peer in peers) else psnr
            fid = f"**{fid}**" if row.fid == min(peer.fid for peer in peers) else fid
        unit = "" if not row.training_set else f" {real}" if row.method.startswith("Progressive") else " trajectories"
        cells = [row.method, f"{row.nfe:g}", psnr, fid, *(_short(n) for n in (row.forwards, row.backwards))]
        cells += [f"{row.training_set:,}{unit}" if row.training_set else "—"]
        cells += [f"{number:,}" if number else "—" for number in (row.parameters, row.bytes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(number: int) -> str:
    """Number of passes in the papers' style: 4.90 M, or 25.0 k."""
    if not number:
        return "—"
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def draw(rows: Sequence[ComparisonRow], features: str, path: Path) -> None:
    """Plot PSNR and Frechet distance of trained methods against the passes spent; dashed lines: best untrained method.

    Args:
        rows: All rows, ground truth first.
        features: Name of the feature extractor.
        path: PNG file to write.
    """
    truth, *others = rows
    trained = [row for row in others if row.parameters]
    markers = {nfe: MARKERS[i % len(MARKERS)] for i, nfe in enumerate(sorted({row.nfe for row in others}))}
    colours = {method: f"C{i % 10}" for i, method in enumerate(dict.fromkeys(row.method for row in trained))}
    figure, (fidelity, distance) = plt.subplots(1, 2, figsize=(11, 4.6))
    _panel(fidelity, others, colours, markers, "psnr_db", "PSNR to ground truth (dB)")
    _panel(distance, others, colours, markers, "fid", fid_column(features))
    _line(distance, truth.fid, "ground truth", 0.8)
    handles = [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
    handles += [
        Line2D([], [], color="grey", marker=marker, linestyle="", label=f"NFE {nfe:g}")
        for nfe, marker in markers.items()
    ]
    figure.tight_layout()
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.0))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _panel(
    axes: Axes,
    rows: Sequence[ComparisonRow],
    colours: Mapping[str, str],
    markers: Mapping[float, str],
    quantity: str,
    label: str,
) -> None:
    """Plot one quantity: a line per trained method, and a dashed line for the best untrained method at each NFE."""
    for method, colour in colours.items():
        mine = [row for row in rows if row.method == method]
        spent, values = [row.forwards + row.backwards for row in mine], [getattr(row, quantity) for row in mine]
        axes.plot(spent, values, color=colour, alpha=0.35)
        for row, x, y in zip(mine, spent, values, strict=True):
            axes.plot(x, y, markers[row.nfe], color=colour)
    best = max if quantity == "psnr_db" else min
    for position, nfe in enumerate(markers):
        untrained = [row for row in rows if not row.parameters and row.nfe == nfe]
        if untrained:
            row = best(untrained, key=lambda row: getattr(row, quantity))
            _line(axes, getattr(row, quantity), f"{row.method}, NFE {nfe:g}", 0.02 + 0.3 * position)
    axes.set_xscale("log")
    axes.set_xlabel("forwards + backwards spent")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, height: float, text: str, position: float) -> None:
    """Draw a labelled dashed line. ``position`` (0 to 1) places the label, so that labels do not overlap."""
    axes.axhline(height, color="grey", linestyle="--", linewidth=1)
    axes.annotate(text, (position, height), xycoords=("axes fraction", "data"), fontsize=8, color="grey", va="bottom")
