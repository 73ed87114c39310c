"""A bill as a picture, and the cost of a report's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from orchestrator.cost import Cost
from orchestrator.reports.folder import Picture, ReportFolder
from orchestrator.reports.gallery import Panel
from orchestrator.results.bill import Bill


def bill_picture(written: ReportFolder, bill: Bill | None) -> Picture | None:
    """Write the picture of a bill; None without a bill."""
    return None if bill is None else written.picture("Cost by item", "bill.png", partial(draw, bill))


def draw(bill: Bill) -> Figure:
    """Bars of network passes and of wall time, one per item."""
    lines = [line for line in bill.items() if line.cost is not None]
    figure, (passes, time) = plt.subplots(1, 2, figsize=(8.2, 0.7 + 0.34 * len(lines)), sharey=True)
    places = range(len(lines))
    costs = [line.cost or Cost() for line in lines]
    forwards, backwards = [cost.forwards for cost in costs], [cost.backwards for cost in costs]
    passes.barh(places, forwards, color="#00838f", label="forward")
    passes.barh(places, backwards, left=forwards, color="#c2185b", label="backward")
    time.barh(places, [cost.seconds or 0.0 for cost in costs], color="#5a6474")
    passes.set_yticks(places, [line.item for line in lines])
    passes.invert_yaxis()  # in the order of the table; shared with the other bars
    passes.set_xlabel("network passes")
    passes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, place: _short(value)))
    passes.locator_params(axis="x", nbins=5)
    passes.legend(fontsize=8, frameon=False, loc="lower right")
    time.set_xlabel("wall time (s)")
    for axes in (passes, time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    return figure


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def gallery_cost(panels: Iterable[Panel], forwards_per_evaluation: Callable[[float], int], seconds: float) -> Cost:
    """Cost of the samples in these panels, without ground truth, which is stored.

    Args:
        panels: The panels.
        forwards_per_evaluation: Forward passes of the network per velocity evaluation at a guidance scale.
        seconds: Wall time of making them.
    """
    evaluations = forwards = 0
    for panel in panels:
        for strip in panel.strips[1:]:
            samples = len(strip.samples) + (0 if strip.waves is None else len(strip.waves))
            evaluations += samples * panel.nfe
            forwards += samples * panel.nfe * forwards_per_evaluation(panel.guidance_scale)
    return Cost(evaluations=evaluations, forwards=forwards, seconds=seconds)
