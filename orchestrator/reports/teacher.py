"""The figure of a teacher's examination."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.hosts.teacher.evidence import Evidence, Knot
from orchestrator.reports.drawing.style import COORDINATES, QUIET, tidy

PLAIN, GUIDED, IDEAL = COORDINATES[1], COORDINATES[0], QUIET


def draw_teacher(path: Path, title: str, evidence: Evidence) -> None:
    """Draw the trajectories and the network as a denoiser, as PNG.

    Args:
        path: The file.
        title: Title of the figure.
        evidence: What was measured; of a teacher that is not finite, what there is.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 3)
    _states(axes[0, 0], evidence)
    _over_time(axes[0, 1], evidence, "noise", "RMS of the implied noise")
    axes[0, 1].axhline(1, color=IDEAL, linestyle=":", linewidth=1)
    _over_time(axes[0, 2], evidence, "velocity", "RMS of the velocity")
    _predictions(axes[1, 0], evidence)
    _denoiser(axes[1, 1], evidence)
    _response(axes[1, 2], evidence)
    figure.savefig(path, dpi=120)


def _lines(evidence: Evidence) -> list[tuple[str, str, tuple[Knot, ...]]]:
    guided = (f"guidance {evidence.guidance_scale:g}", GUIDED, evidence.guided)
    return [line for line in (("unguided", PLAIN, evidence.knots), guided) if line[2]]


def _states(axes: Axes, evidence: Evidence) -> None:
    for label, colour, knots in _lines(evidence):
        times = [knot.t for knot in knots]
        axes.plot(times, [knot.state for knot in knots], color=colour, label=label)
        axes.plot(times, [knot.expected for knot in knots], color=colour, linestyle=":", label=f"{label}, of the path")
    tidy(axes, "t", "RMS of the states")
    axes.legend(fontsize=7, frameon=False)


def _over_time(axes: Axes, evidence: Evidence, name: str, label: str) -> None:
    for _, colour, knots in _lines(evidence):
        axes.plot([knot.t for knot in knots], [getattr(knot, name) for knot in knots], color=colour)
    tidy(axes, "t", label)


def _predictions(axes: Axes, evidence: Evidence) -> None:
    for _, colour, knots in _lines(evidence):
        axes.plot([knot.t for knot in knots], [max(knot.prediction, 0.0) ** 0.5 for knot in knots], color=colour)
    if evidence.spread is not None:
        axes.axhline(evidence.spread, color=IDEAL, linestyle=":", linewidth=1)
    tidy(axes, "t", "spread of the predicted data")


def _denoiser(axes: Axes, evidence: Evidence) -> None:
    signals = [level.signal for level in evidence.levels]
    largest = 0.0
    for name, colour, label in (
        ("error", COORDINATES[1], "error / best linear"),
        ("removable", COORDINATES[2], "share that a line removes"),
        ("surplus", COORDINATES[3], "invented variance"),
    ):
        values = [getattr(level, name) for level in evidence.levels]
        axes.plot(signals, values, color=colour, label=label, marker=".")
        largest = max([largest, *map(abs, values)])
    axes.set(xscale="log")
    if largest > 3:  # of a network that is not right
        axes.set_yscale("symlog", linthresh=1.0)
    tidy(axes, "signal / noise", "as a denoiser of its samples")
    axes.legend(fontsize=7, frameon=False)


def _response(axes: Axes, evidence: Evidence) -> None:
    axes.plot(
        [t for t, _ in evidence.time_response],
        [change for _, change in evidence.time_response],
        color=PLAIN,
        marker=".",
    )
    axes.set_ylim(bottom=0)
    tidy(axes, "native time", "change of the output per unit of time")
