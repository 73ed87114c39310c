"""Which drawing shows samples of which kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from orchestrator.models.facts import ModelFacts
from orchestrator.models.kinds import Kind
from orchestrator.reports.drawing.clouds import draw_points, draw_vectors
from orchestrator.reports.drawing.images import draw_frames, draw_images, draw_video
from orchestrator.reports.drawing.lines import draw_series, draw_trajectories
from orchestrator.reports.gallery import DIFFERENCE_GAIN, Panel


class Drawing(NamedTuple):
    """How samples of one kind are drawn.

    Attributes:
        draw: Draws a panel's samples of all solvers from the same noise; ground truth comes first.
        caption: What the figure shows, to complete 'Samples at NFE 8 from the same noise, '.
    """

    draw: Callable[[Panel, ModelFacts], Figure]
    caption: str


_DIFFERENCES = f"with differences from ground truth (×{DIFFERENCE_GAIN})"
_LINES = f"over ground truth in grey, {_DIFFERENCES} below"

DRAWINGS: dict[Kind, Drawing] = {
    "image": Drawing(draw_images, _DIFFERENCES),
    "sound": Drawing(draw_frames, _DIFFERENCES),
    "video": Drawing(draw_video, _DIFFERENCES),
    "vectors": Drawing(draw_vectors, "joined to ground truth in grey"),
    "points": Drawing(draw_points, "joined to ground truth in grey"),
    "series": Drawing(draw_series, _LINES),
    "trajectory": Drawing(draw_trajectories, _LINES),
}
