"""Draws theta itself: its times on an axis beside those of other solvers, and its coefficients as a heat map."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure

from orchestrator.reports.drawing.style import QUIET, SAMPLE, TRUTH, Array
from solvers.ns import NSSolver

COLOURS = "PuOr_r"
"""Diverging colours that stay apart for colour-blind readers. In grey, dark means large; the sign is written."""
NUMBERED = 12
"""Largest NFE whose coefficients are written into the cells; beyond it, negative ones have a dash."""
CELL = 0.52
"""Size of a cell in inches, up to :data:`NUMBERED`; more of them share the same width."""


def draw_theta(theta: NSSolver, others: Mapping[str, NSSolver]) -> Figure:
    """The times of theta above those of other solvers, then a and b of x_k = a_k x0 + sum_j b_kj u_j, row by row.

    Args:
        theta: The solver whose coefficients are shown.
        others: Further solvers whose times are shown, by name.
    """
    nfe = theta.nfe
    cell = CELL * min(1.0, NUMBERED / nfe)
    side = cell * (nfe + 1)
    lines = 1 + len(others)
    figure, (upper, lower) = plt.subplots(
        2,
        1,
        figsize=(max(side + cell, 5.4), 0.35 * lines + 1.2 + side),
        height_ratios=(0.35 * lines + 0.3, side),
        layout="constrained",
    )
    _times(upper, {"theta": theta} | dict(others))
    _coefficients(figure, lower, theta)
    return figure


def _times(axes: Axes, solvers: Mapping[str, NSSolver]) -> None:
    """A line per solver with a mark at each of its times, between noise at 0 and data at 1."""
    for line, solver in enumerate(solvers.values()):
        times = solver.times.tolist()
        colour = SAMPLE if line == 0 else QUIET
        axes.plot([0, 1], [line, line], color=TRUTH, linewidth=0.6, zorder=0)
        axes.plot(times, [line] * len(times), "o" if line == 0 else "|", color=colour, markersize=6 if line == 0 else 9)
    axes.set_yticks(range(len(solvers)), list(solvers), fontsize=9)
    axes.set_ylim(len(solvers) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks(np.linspace(0, 1, 11), [f"{t:g}" for t in np.linspace(0, 1, 11).round(1)], fontsize=8)
    axes.set_xlabel("time t of each evaluation, from noise (0) to data (1)", fontsize=9)
    axes.tick_params(length=2, color=TRUTH)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _coefficients(figure: Figure, axes: Axes, theta: NSSolver) -> None:
    """A column for a, and one for each velocity; a row per state. The colours grow with the root of the size."""
    nfe = theta.nfe
    cells = np.full((nfe + 1, nfe + 1), np.nan)
    cells[:, 0] = theta.a.numpy()
    rows, columns = np.tril_indices(nfe + 1, -1)
    cells[rows, columns + 1] = theta.b.numpy()[rows, columns]
    largest = float(np.nanmax(np.abs(cells))) or 1.0
    norm = FuncNorm((_root, _square), vmin=-largest, vmax=largest)
    image = axes.imshow(cells, cmap=COLOURS, norm=norm, aspect="auto")
    _written(axes, cells, norm)
    axes.set_xticks(range(nfe + 1), ["a", *(f"u{j}" for j in range(nfe))], fontsize=8)
    axes.set_yticks(range(nfe + 1), [f"x{k}" for k in range(nfe)] + ["sample"], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_ticks([-largest, -largest / 4, 0, largest / 4, largest])
    bar.ax.set_yticklabels([f"{value:.2g}" for value in (-largest, -largest / 4, 0, largest / 4, largest)], fontsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _written(axes: Axes, cells: Array, norm: FuncNorm) -> None:
    """Numbers in the cells, or dashes in negative ones of a large theta."""
    few = len(cells) - 1 <= NUMBERED
    for (row, column), value in np.ndenumerate(cells):
        if np.isnan(value) or not (few or value < 0):
            continue
        dark = abs(float(norm(value)) - 0.5) > 0.3
        text = f"{value:.2f}".replace("-", "−") if few else "−"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=7 if few else 6, color="white" if dark else "#1c2330"
        )


def _root(values: Array) -> Array:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Array) -> Array:
    return np.sign(values) * np.square(values)
