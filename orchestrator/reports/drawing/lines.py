"""Draws series and trajectories: lines over those of ground truth, their difference below, and paths in the plane."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec, SubplotSpec
from matplotlib.lines import Line2D

from orchestrator.models.facts import ModelFacts
from orchestrator.reports.drawing.plane import Plane
from orchestrator.reports.drawing.style import (
    COORDINATES,
    FULL,
    QUIET,
    SAMPLE,
    TRUTH,
    Array,
    framed,
    limits,
    named_left,
    remark,
    title_of,
)
from orchestrator.reports.gallery import DIFFERENCE_GAIN, MOST, Panel

WIDTH = 8.6
"""Width of a row of four series or three trajectories, in inches; of fewer, each is as wide."""
PATH = 1.15
"""Width of a path in the plane, in inches."""
BLOCK = 1.2
"""Height of a solver's lines with their differences, in inches."""


def draw_series(panel: Panel, facts: ModelFacts) -> Figure:
    """Series, (N, T, D), (N, C, T) or (N, T): every coordinate against time, the longer axis, over ground truth."""
    first, *others = panel.strips[0].samples.shape[1:]
    return _draw(panel, MOST["series"], time_last=bool(others) and first < others[0])


def draw_trajectories(panel: Panel, facts: ModelFacts) -> Figure:
    """Trajectories, (N, T, D): like series and, with 2 or 3 coordinates, also as paths in the plane.

    Those with 2 or 3 coordinates may also be (N, D, T).
    """
    first, last = panel.strips[0].samples.shape[1:]
    time_last = first in (2, 3) and last > 3
    return _draw(panel, MOST["trajectory"], time_last=time_last, paths=(first if time_last else last) in (2, 3))


def _draw(panel: Panel, most: int, *, time_last: bool, paths: bool = False) -> Figure:
    truth, *solvers = (_by_time(strip.samples, time_last) for strip in (panel.strips[0], *panel.compared))
    chosen = _coordinates(truth)
    rows, count = len(solvers), len(truth)
    plane = Plane.of(truth.reshape(-1, truth.shape[-1])) if paths else None
    cell_width = WIDTH / most
    figure = plt.figure(figsize=(count * cell_width, BLOCK * rows))
    outer = figure.add_gridspec(rows, count, **FULL, wspace=0.14, hspace=0.24)
    for row, (strip, samples) in enumerate(zip(panel.compared, solvers, strict=True)):
        for sample in range(count):
            cell = outer[row, sample]
            if plane is not None:
                halves = GridSpecFromSubplotSpec(1, 2, cell, width_ratios=(PATH, cell_width - PATH), wspace=0.34)
                left, cell = halves[0], halves[1]
                _path(figure.add_subplot(left), plane, truth[sample], samples[sample], truth)
            upper = _lines(figure, cell, truth, samples, sample, chosen, last=row == rows - 1)
            if sample == 0:
                first, gap = (upper, 30) if plane is None else (figure.axes[-3], 6)  # numbers stand beside lines
                named_left(first, title_of(strip), gap)
    _legend(figure, chosen, truth.shape[-1])
    return figure


def _by_time(samples: npt.NDArray[np.float32], time_last: bool) -> Array:
    """Samples as (N, T, D); what is not finite is NaN."""
    values = samples.reshape(len(samples), *(samples.shape[1:] if samples.ndim == 3 else (-1, 1))).astype(np.float64)
    values[~np.isfinite(values)] = np.nan
    return values.swapaxes(1, 2) if time_last else values


def _coordinates(truth: Array) -> list[int]:
    """The coordinates to draw: as many as there are colours, those that vary most."""
    spread = np.nan_to_num(truth).std(axis=(0, 1))
    return sorted(np.argsort(-spread, kind="stable")[: len(COORDINATES)].tolist())


def _lines(
    figure: Figure, cell: SubplotSpec, truth: Array, samples: Array, sample: int, chosen: list[int], *, last: bool
) -> Axes:
    """Draw one sample's coordinates over ground truth, and their differences below; returns the upper axes."""
    halves = GridSpecFromSubplotSpec(2, 1, cell, height_ratios=(2, 1), hspace=0.12)
    upper, lower = figure.add_subplot(halves[0]), figure.add_subplot(halves[1])
    low, high = limits(truth[..., chosen])
    largest = (high - low) / 2 / DIFFERENCE_GAIN / 2  # the lower axes have half the height of the upper
    for colour, coordinate in zip(COORDINATES, chosen, strict=False):
        expected, actual = truth[sample, :, coordinate], samples[sample, :, coordinate]
        upper.plot(expected, color=TRUTH, linewidth=2.6, solid_capstyle="round")
        upper.plot(actual, color=colour, linewidth=1.1)
        lower.plot(actual - expected, color=colour, linewidth=1)
    if not np.isfinite(samples[sample]).all():
        remark(upper, "not finite")
    upper.set_ylim(low, high)
    lower.set_ylim(-largest, largest)
    lower.axhline(0, color=TRUTH, linewidth=0.6, zorder=0)
    for axis in (upper, lower):
        axis.set_xlim(0, max(truth.shape[1] - 1, 1))
        axis.tick_params(labelsize=7, length=2, color=TRUTH, labelcolor=QUIET)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[:].set_color(TRUTH)
        axis.locator_params(nbins=3, axis="y")
    upper.tick_params(labelbottom=False, bottom=False)
    lower.tick_params(labelbottom=last, bottom=last)
    if sample:
        upper.tick_params(labelleft=False)
        lower.tick_params(labelleft=False)
    return upper


def _path(axis: Axes, plane: Plane, expected: Array, actual: Array, truth: Array) -> None:
    """Draw the path of one trajectory over that of ground truth; a dot marks its start."""
    everything = plane.project(truth.reshape(-1, truth.shape[-1]))
    for path, colour, width in ((plane.project(expected), TRUTH, 2.6), (plane.project(actual), SAMPLE, 1.1)):
        axis.plot(path[:, 0], path[:, 1], color=colour, linewidth=width, solid_capstyle="round")
        axis.plot(path[:1, 0], path[:1, 1], "o", color=colour, markersize=2 + width)
    framed(axis, everything)


def _legend(figure: Figure, chosen: list[int], coordinates: int) -> None:
    """Name ground truth and the coordinates at the top."""
    handles = [Line2D([], [], color=TRUTH, linewidth=2.6, label="ground truth")]
    if coordinates == 1:
        handles.append(Line2D([], [], color=COORDINATES[0], linewidth=1.1, label="sample"))
    else:
        handles += [
            Line2D([], [], color=colour, linewidth=1.1, label=f"coordinate {number + 1}")
            for colour, number in zip(COORDINATES, chosen, strict=False)
        ]
    title = None if coordinates == len(chosen) else f"the {len(chosen)} of {coordinates} coordinates that vary most"
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(handles), 5),
        fontsize=8,
        frameon=False,
        title=title,
        title_fontsize=8,
    )
