"""Draws vectors and sets of points: scatter plots over ground truth, from the same noise."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from orchestrator.models.facts import ModelFacts
from orchestrator.reports.drawing.plane import Plane
from orchestrator.reports.drawing.style import (
    FULL,
    SAMPLE,
    TRUTH,
    Array,
    finite_rows,
    framed,
    limits,
    named_left,
    remark,
    tidy,
    title_of,
)
from orchestrator.reports.gallery import Panel

COLUMNS = 4
"""Scatter plots of vectors in a row."""
SIDE = 2.35
"""Side of a scatter plot of vectors, in inches."""
SET_SIDE = 1.35
"""Side of a scatter plot of one set of points, in inches."""


def draw_vectors(panel: Panel, facts: ModelFacts) -> Figure:
    """Vectors, (N, ...): one scatter plot per solver, in the plane of ground truth's leading principal components.

    Numbers, (N, 1), are plotted against ground truth's.
    """
    truth, *solvers = (
        finite_rows(strip.samples).reshape(len(strip.samples), -1) for strip in (panel.strips[0], *panel.compared)
    )
    columns = min(COLUMNS, len(solvers))
    rows = math.ceil(len(solvers) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(SIDE * columns, (SIDE + 0.35) * rows), squeeze=False, sharex=True, sharey=True
    )
    for axis in grid.flat[len(solvers) :]:
        axis.set_visible(False)
    if truth.shape[1] == 1:
        names = ("ground truth", "sample")
        ends = limits(truth)
    else:
        plane = Plane.of(truth)
        names = plane.names
    for number, (axis, strip, samples) in enumerate(zip(grid.flat, panel.compared, solvers, strict=False)):
        if truth.shape[1] == 1:
            axis.plot(ends, ends, color=TRUTH, linewidth=2.6, zorder=0)
            axis.set(xlim=ends, ylim=ends)
            axis.scatter(truth[:, 0], samples[:, 0], s=6, color=SAMPLE, alpha=0.6, linewidths=0)
        else:
            _scatter(axis, plane.project(truth), plane.project(samples), size=9.0, alpha=0.7)
        _count_outside(axis, samples if truth.shape[1] == 1 else plane.project(samples))
        tidy(axis, names[0] if number + columns >= len(solvers) else "", names[1] if number % columns == 0 else "")
        axis.tick_params(labelsize=7, labelbottom=number + columns >= len(solvers))
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        axis.set_title(title_of(strip), fontsize=9)
    figure.tight_layout()
    return figure


def draw_points(panel: Panel, facts: ModelFacts) -> Figure:
    """Sets of points, (N, points, D) or (N, D, points): one scatter plot per solver and sample."""
    truth, *solvers = (_by_point(finite_rows(strip.samples)) for strip in (panel.strips[0], *panel.compared))
    count = len(truth)
    plane = Plane.of(truth.reshape(-1, truth.shape[-1]))
    rows = len(solvers)
    figure, grid = plt.subplots(
        rows,
        count,
        figsize=(SET_SIDE * count, SET_SIDE * rows),
        squeeze=False,
        gridspec_kw=FULL | {"wspace": 0.06, "hspace": 0.06},
    )
    size = min(12.0, max(1.5, 400 / truth.shape[1]))
    everything = plane.project(truth.reshape(-1, truth.shape[-1]))
    for row, strip, samples in zip(grid, panel.compared, solvers, strict=True):
        for axis, expected, actual in zip(row, truth, samples, strict=True):
            _scatter(axis, plane.project(expected), plane.project(actual), size=size, alpha=0.9)
            framed(axis, everything)
            _count_outside(axis, plane.project(actual))
        named_left(row[0], title_of(strip))
    return figure


def _by_point(samples: Array) -> Array:
    """Sets of points as (N, points, D): D is the axis of length 2 or 3, or else the shorter one."""
    first, second = samples.shape[1:]
    coordinates_last = second in (2, 3) or (first not in (2, 3) and second <= first)
    return samples if coordinates_last else samples.swapaxes(1, 2)


def _scatter(axis: Axes, truth: Array, samples: Array, *, size: float, alpha: float) -> None:
    """Scatter samples (N, 2) over ground truth, each joined to the ground truth of the same noise."""
    axis.add_collection(
        LineCollection(list(np.stack([truth, samples], axis=1)), colors=TRUTH, linewidths=0.6, zorder=1)
    )
    axis.scatter(truth[:, 0], truth[:, 1], s=size, color=TRUTH, linewidths=0, zorder=2)
    axis.scatter(samples[:, 0], samples[:, 1], s=size, color=SAMPLE, alpha=alpha, linewidths=0, zorder=3)
    axis.set(xlim=limits(truth[:, 0]), ylim=limits(truth[:, 1]))


def _count_outside(axis: Axes, points: npt.NDArray[np.float64]) -> None:
    """Write how many samples the axes do not show, those that are not finite among them."""
    ends = [axis.get_ylim()] if points.shape[1] == 1 else [axis.get_xlim(), axis.get_ylim()]
    inside = np.all([(low <= values) & (values <= high) for (low, high), values in zip(ends, points.T, strict=True)], 0)
    if not inside.all():
        remark(axis, f"{int((~inside).sum())} outside")
