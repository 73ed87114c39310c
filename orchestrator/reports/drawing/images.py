"""Draws images, mel frames and video: one row per solver, and its difference from ground truth below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from orchestrator.models.facts import ModelFacts
from orchestrator.reports.drawing.style import FULL, QUIET, Array, named_left, title_of
from orchestrator.reports.gallery import DIFFERENCE_GAIN, Panel

WIDTH, HEIGHT = 9.0, 0.74
"""Width of a row of pictures, which decides how many there are, and height of a row, in inches."""
WIDEST = 11.0
"""Width in inches beyond which pictures become smaller: two wide ones, or the frames of a video."""
FRAMES = 6
"""Frames shown of each video."""
CHANNELS = 16
"""Channels shown of a picture that is neither grey nor coloured."""
FINE = 48
"""Pixels to which the shorter side of channels side by side is enlarged, if it is shorter."""
GAP = 0.25
"""Space between two videos, as a share of a frame's width."""


def draw_images(panel: Panel, facts: ModelFacts) -> Figure:
    """Images, (N, C, H, W) or (N, H, W), on the model's range of data; channels side by side unless C is 1 or 3."""
    return _draw(panel, (facts.data_min, facts.data_max))


def draw_frames(panel: Panel, facts: ModelFacts) -> Figure:
    """Frames of sound, (N, F, T), on the range of ground truth; low frequencies at the bottom."""
    truth = panel.strips[0].samples
    finite = truth[np.isfinite(truth)]
    lowest, highest = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return _draw(panel, (lowest, max(highest, lowest + 1e-6)), upwards=True)


def draw_video(panel: Panel, facts: ModelFacts) -> Figure:
    """Video, (N, C, T, H, W) or (N, T, H, W): evenly spaced frames in a row."""
    samples = panel.strips[0].samples
    length = samples.shape[-3]
    shown = np.unique(np.linspace(0, length - 1, min(FRAMES, length)).round().astype(int))

    def frames(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        chosen = samples[..., shown, :, :]
        chosen = np.moveaxis(chosen, -3, 1)  # (N, frames, C, H, W)
        return chosen.reshape(-1, *chosen.shape[2:])

    figure = _draw(panel, (facts.data_min, facts.data_max), frames=frames, group=len(shown))
    names = [f"frame {number + 1}" for number in shown] * len(samples)
    for axis, name in zip(figure.axes, names, strict=False):  # the first row's axes come first
        axis.set_title(name, fontsize=7, color=QUIET, pad=3)
    return figure


def _draw(
    panel: Panel, shown: tuple[float, float], *, upwards: bool = False, frames: Any = None, group: int | None = None
) -> Figure:
    """One row of pictures per strip, each but ground truth with a row of differences.

    Args:
        panel: The samples.
        shown: Values that are black and white.
        upwards: Whether the first row of a picture is at the bottom.
        frames: Turns samples into pictures; by default each sample is one.
        group: Pictures in a group; groups are set apart.
    """
    smallest, largest = shown
    as_pictures = frames or (lambda samples: samples)
    truth = as_pictures(panel.strips[0].samples).astype(np.float64)
    rows: list[tuple[str, list[Array], str]] = []
    for strip in panel.strips:
        pictures = as_pictures(strip.samples).astype(np.float64)
        levels = 2 * (pictures - smallest) / (largest - smallest) - 1
        rows.append((title_of(strip), [_picture(level) for level in levels], "gray"))
        if strip is not panel.strips[0]:
            with np.errstate(invalid="ignore"):  # samples that are not finite
                differences = DIFFERENCE_GAIN * 2 * (pictures - truth) / (largest - smallest)
            rows.append((f"difference ×{DIFFERENCE_GAIN}", [_picture(one) for one in differences], "coolwarm"))
    return _grid(rows, "lower" if upwards else "upper", group)


def _grid(rows: Sequence[tuple[str, list[Array], str]], origin: Any, group: int | None) -> Figure:
    """Rows of (title, pictures, colour map), as many pictures of a row as fit."""
    height, width = rows[0][1][0].shape[:2]
    aspect = min(max(width / height, 0.25), 5.0)
    size = 0.97 * HEIGHT * aspect
    count = len(rows[0][1]) if group else min(len(rows[0][1]), max(2, int(WIDTH / size)))
    groups = [range(first, min(first + (group or count), count)) for first in range(0, count, group or count)]
    widths = [ratio for one in groups for ratio in [*(1.0 for _ in one), GAP]][:-1]
    scale = min(1.0, WIDEST / (size * sum(widths)))
    figure = plt.figure(figsize=(scale * size * sum(widths), scale * HEIGHT * len(rows)))
    grid = figure.add_gridspec(len(rows), len(widths), **FULL, wspace=0.05, hspace=0.08, width_ratios=widths)
    columns = [position for position, ratio in enumerate(widths) if ratio == 1.0]
    for line, (title, pictures, colours) in enumerate(rows):
        for position, picture in zip(columns, pictures[:count], strict=True):
            axis = figure.add_subplot(grid[line, position])
            fit = "equal" if aspect == width / height else "auto"
            axis.imshow(picture, cmap=colours, vmin=-1, vmax=1, interpolation="nearest", origin=origin, aspect=fit)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if _is_blank(picture):
                axis.text(width / 2, height / 2, "not finite", ha="center", va="center", fontsize=7, color=QUIET)
            if position == 0:
                named_left(axis, title)
    return figure


def _picture(levels: Array) -> Array:
    """Levels in [-1, 1] as imshow expects them, clipped: (H, W) in [-1, 1], or (H, W, 4) in [0, 1]; NaN is blank."""
    levels = levels.clip(-1, 1)
    if levels.ndim == 1:
        return levels[None]
    if levels.ndim == 2:
        return levels
    channels = levels.reshape(-1, *levels.shape[-2:])
    if len(channels) == 3:
        opaque = 1.0 - np.isnan(channels).any(axis=0, keepdims=True)
        return np.concatenate([np.nan_to_num(channels) / 2 + 0.5, opaque]).transpose(1, 2, 0)
    return _side_by_side(channels[:CHANNELS])


def _is_blank(picture: Array) -> bool:
    """Whether nothing is shown of a picture, since no value is finite."""
    missing = picture[..., 3] == 0 if picture.ndim == 3 else np.isnan(picture)
    return bool(missing.all())


def _side_by_side(channels: Array) -> Array:
    """Channels (C, H, W) as one picture, in about as many rows as columns, with a thin line between them."""
    if len(channels) == 1:
        return channels[0]
    enlarged = -(-FINE // min(channels.shape[1:]))  # of eight pixels, a line would be an eighth
    channels = channels.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    columns = int(np.ceil(np.sqrt(len(channels))))
    rows = -(-len(channels) // columns)
    _, height, width = channels.shape
    line = round(0.04 * min(height, width))
    picture = np.full((rows * (height + line) - line, columns * (width + line) - line), np.nan)
    for number, channel in enumerate(channels):
        row, column = divmod(number, columns)
        top, left = row * (height + line), column * (width + line)
        picture[top : top + height, left : left + width] = channel
    return picture
