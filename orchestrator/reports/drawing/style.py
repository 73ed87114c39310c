"""What all figures have in common: the backend, axes, colours, and the values that they can show."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # a cluster's head node has no display

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from orchestrator.metrics.base import shown_db
from orchestrator.reports.gallery import Strip

Array = npt.NDArray[np.float64]

TRUTH = "#9aa3b0"
"""Colour of ground truth beneath a solver's samples."""
SAMPLE = "#c2185b"
"""Colour of a solver's samples."""
COORDINATES = ("#c2185b", "#1565c0", "#e65100", "#2e7d32", "#7b1fa2", "#00838f", "#5d4037", "#827717")
"""Colours of the coordinates of a series."""
QUIET = "#5a6474"
"""Colour of remarks and numbers on axes."""
FULL = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}
"""Margins of a figure whose size is that of its axes; titles and labels, beside it, are added when it is saved."""
MARGIN = 0.15
"""Space around ground truth, as a share of its range."""


def tidy(axes: Axes, x: str, y: str) -> None:
    """Set axis labels and a faint grid, and hide the upper and right spines."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def title_of(strip: Strip) -> str:
    """Name of a solver and, on a line of its own, its PSNR."""
    return strip.name if strip.psnr_db is None else f"{strip.name}\n{shown_db(strip.psnr_db, 1)} dB"


def named_left(axes: Axes, title: str, gap: float = 6) -> None:
    """Write the title of a row to the left of its first axes, at a gap in points."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(title, (0, 0.5), (-gap, 0), fontsize=9, linespacing=1.3, annotation_clip=False, **place)  # type: ignore[arg-type]


def remark(axes: Axes, text: str) -> None:
    """Write a remark into the lower right corner."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "zorder": 4}
    axes.text(0.97, 0.04, text, fontsize=7, color=QUIET, bbox=box, **place)  # type: ignore[arg-type]


def limits(truth: Array) -> tuple[float, float]:
    """Limits of an axis that shows ground truth with a margin, whatever a solver does that diverges."""
    values = truth[np.isfinite(truth)]
    if not len(values):
        return -1.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = MARGIN * (high - low) or 0.5
    return low - margin, high + margin


def framed(axes: Axes, truth: Array) -> None:
    """Show the square around ground truth's points (N, 2), in equal units and a faint frame."""
    ends = [limits(truth[:, 0]), limits(truth[:, 1])]
    half = max(high - low for low, high in ends) / 2
    (left, right), (bottom, top) = (((low + high) / 2 - half, (low + high) / 2 + half) for low, high in ends)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_color("#e6e9ee")


def finite_rows(samples: npt.NDArray[np.float32]) -> Array:
    """Samples (N, ...) in float64; those with a value that is not finite are all NaN, which figures leave out."""
    values = samples.astype(np.float64)
    values[~np.isfinite(values.reshape(len(values), -1)).all(axis=1)] = np.nan
    return values
