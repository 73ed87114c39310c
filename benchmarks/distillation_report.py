"""Reports of ``bench_distillation.py``: its runs, their validations, and the tables made of them."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from publishing import RESULTS, table

PUBLISHED_RATE = 5e-4
"""Learning rate of Algorithm 2."""
WITHIN_DB = 0.2
"""Distance to the best Adam that counts as having reached it, dB."""


class Run(NamedTuple):
    """One distillation; ``rate`` is Adam's learning rate, 0 for Levenberg-Marquardt."""

    model: str
    guidance: float
    nfe: int
    seed: int
    method: str
    rate: float = 0.0

    @property
    def label(self) -> str:
        return f"adam {self.rate:g}" if self.method == "adam" else self.method


@dataclass(frozen=True)
class Mark:
    """Validation PSNR of a run, and its cost so far: network forwards and backwards on training pairs."""

    iteration: int
    psnr: float
    forwards: int
    backwards: int
    seconds: float
    """Without validation; for batched runs, an equal share of the batch."""

    def cost(self, backward: float) -> float:
        """Cost in forwards; a backward counts as ``backward`` forwards."""
        return self.forwards + backward * self.backwards


def best_of(marks: Sequence[Mark]) -> Mark:
    return max(marks, key=lambda mark: mark.psnr)


def share(lm_marks: Sequence[Mark], target: float, cost: float, backward: float) -> str:
    """The cost of Levenberg-Marquardt to reach ``target`` dB, as a share of ``cost``."""
    mark = next((mark for mark in lm_marks if mark.psnr >= target), None)
    return f"1/{cost / max(1, mark.cost(backward)):.0f}" if mark else "not reached"


def ratios(runs: dict[Run, list[Mark]], backward: float) -> str:
    """A table of Levenberg-Marquardt against Algorithm 2 as published and against the best learning rate."""
    rows = []
    for run, marks in runs.items():
        adams = {other.rate: curve for other, curve in runs.items() if other[:4] == run[:4] and other.method == "adam"}
        if run.method != "lm" or not adams:
            continue
        rate, tuned = max(adams.items(), key=lambda item: best_of(item[1]).psnr)
        aim = best_of(tuned).psnr
        row = [run.model, f"{run.guidance:g}", str(run.nfe), str(run.seed), f"{best_of(marks).psnr:.2f}"]
        published = adams.get(PUBLISHED_RATE)
        if published is None:
            row += ["not run", ""]
        else:
            cost = published[-1].cost(backward)
            row += [f"{best_of(published).psnr:.2f}", share(marks, best_of(published).psnr, cost, backward)]
        row += [f"{aim:.2f} ({rate:g})", share(marks, aim - WITHIN_DB, tuned[-1].cost(backward), backward)]
        rows.append([*row, f"{best_of(marks).psnr - aim:+.2f}"])
    heading = ["model", "guidance", "NFE", "seed", "LM (dB)", "published (dB)", "LM's cost to reach it"]
    return table(
        [*heading, "best Adam (dB, rate)", f"LM's cost to {WITHIN_DB:g} dB below", "LM - best Adam (dB)"], rows
    )


def summary(runs: dict[Run, list[Mark]]) -> str:
    """A table of each run's best mark, its cost up to there, and its total cost."""
    rows = []
    for run, marks in runs.items():
        best, last = best_of(marks), marks[-1]
        row = [run.model, f"{run.guidance:g}", str(run.nfe), str(run.seed), run.label, f"{marks[0].psnr:.2f}"]
        row += [f"{best.psnr:.2f}", str(best.iteration), f"{best.forwards:,}"]
        rows.append([*row, str(last.iteration), f"{last.forwards:,}", f"{last.backwards:,}", f"{last.seconds:.1f}"])
    heading = ["model", "guidance", "NFE", "seed", "method", "start (dB)", "best (dB)", "at iteration", "at forwards"]
    return table([*heading, "iterations", "forwards", "backwards", "seconds"], rows)


def curves(runs: dict[Run, list[Mark]]) -> str:
    """Validations of every run: all if it is short, otherwise about 16, evenly spaced, with the best and the last."""
    parts = []
    for run, marks in runs.items():
        step = max(1, len(marks) // 16)
        selected = [mark for i, mark in enumerate(marks) if i % step == 0 or mark in (best_of(marks), marks[-1])]
        text = ", ".join(f"{mark.iteration}: {mark.psnr:.2f}" for mark in selected)
        parts.append(f"- {run.model}, w={run.guidance:g}, NFE {run.nfe}, seed {run.seed}, {run.label}: {text}")
    return "\n".join(parts)


def write_report(runs: dict[Run, list[Mark]], backward: float, options: Mapping[str, Any], name: str) -> Path:
    """Write the report of all runs to the folder of results, and return its path.

    Args:
        runs: The validations of each run.
        backward: Cost of a backward in forwards.
        options: The benchmark's options by name.
        name: Name of the file, after the date.
    """
    today = datetime.date.today().isoformat()
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}-{name}.md"
    path.write_text(
        f"# Distillation without a backward pass, against Adam\n\n"
        f"{today} · {os.cpu_count()} CPU cores ({platform.machine()}), one thread · torch {torch.__version__} · made "
        f"by `python benchmarks/bench_distillation.py` with\n{settings}.\n\n"
        f"Forwards and backwards are passes of the network over one sample, spent on training pairs; making the pairs "
        f"and\nvalidating are neither counted nor in the seconds. A backward is charged as {backward:.2f} forwards, "
        f"as measured on the first model\nand this batch. The cost of Adam is that of its whole run, "
        f"{options['adam_iterations']:,} iterations; `published` is Algorithm 2 at {PUBLISHED_RATE:g}. PSNRs are of\n"
        f"the best validated iterate.\n\n"
        f"{ratios(runs, backward)}\n\n## All runs\n\n{summary(runs)}\n\n## Curves\n\n"
        f"Iteration and validation PSNR (dB).\n\n{curves(runs)}\n"
    )
    return path
