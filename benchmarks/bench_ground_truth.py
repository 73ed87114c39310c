"""Evaluations and error of ground truth, by dopri5's tolerance, first step and safety factor.

The error is each sample's RMS distance from a solution at 1e-9 with a tiny first step. "At equal error" compares the
evaluations at the error that torchdiffeq's defaults (an estimated first step, safety 0.9) reach at the same tolerance,
by interpolation between tolerances on logarithmic axes; below 1 is cheaper.

python benchmarks/bench_ground_truth.py
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from publishing import command, load, publish, quick_option, results_option, table
from torch import Tensor

from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs.ground_truth import solve
from solvers.field import VelocityField

CASES = (
    ("digits_fm_ot", 1.0, 32, 6),
    ("digits_fm_ot", 3.0, 32, 6),
    ("digits_eps_vp", 1.0, 32, 6),
    ("digits_fm_v_cs", 1.0, 32, 6),
    ("cifar10_gray16_fm_ot", 1.0, 16, 3),
    ("spoken_digits_fm_ot", 1.0, 4, 2),
)
"""Model, guidance scale, pairs of a batch, number of batches."""

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
FIRST_STEPS = (None, 1e-2, 1e-3)
SAFETIES = (0.9, 0.8, 0.7, 0.6)
Control = tuple[float | None, float]
CONTROLS: list[Control] = list(itertools.product(FIRST_STEPS, SAFETIES))
DEFAULT: Control = (None, 0.9)


class Run(NamedTuple):
    """Mean evaluations of a batch, and the mean and largest RMS error of a sample."""

    nfe: float
    mean: float
    worst: float


def batches_of(weights: str, guidance_scale: float, batch: int, count: int) -> list[tuple[VelocityField, Tensor]]:
    """Fields of a model of the zoo, one per batch of conditions, with the batch's noise."""
    model = ZooModel(weights)
    speech = SpokenDigits()
    batches = []
    for index in range(count):
        rows = range(index * batch, (index + 1) * batch)
        condition = speech.infilling(speech.conditions(0, rows)) if model.rate else torch.tensor(list(rows)) % 10
        noise = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(index))
        batches.append((model.field(condition, guidance_scale), noise))
    return batches


def measure(weights: str, guidance_scale: float, batch: int, count: int) -> dict[Control, list[Run]]:
    """Runs at all tolerances, by first step and safety."""
    batches = batches_of(weights, guidance_scale, batch, count)
    references = [solve(field, x0, 1e-9, 1e-9, first_step=1e-4, safety=0.7).x1 for field, x0 in batches]
    runs: dict[Control, list[Run]] = {}
    for first_step, safety in CONTROLS:
        for tolerance in TOLERANCES:
            solutions = [
                solve(field, x0, tolerance, tolerance, first_step=first_step, safety=safety) for field, x0 in batches
            ]
            pairs = zip(solutions, references, strict=True)
            errors = torch.cat([(s.x1 - reference).flatten(1).square().mean(1).sqrt() for s, reference in pairs])
            nfe = sum(solution.nfe for solution in solutions) / count
            runs.setdefault((first_step, safety), []).append(Run(nfe, float(errors.mean()), float(errors.max())))
    return runs


def cost_at(runs: list[Run], error: float, attribute: str) -> float:
    """Evaluations at which ``runs`` reach an error, interpolated on logarithmic axes; extrapolated beyond its ends."""
    points = sorted((math.log(getattr(run, attribute)), math.log(run.nfe)) for run in runs)
    errors, costs = (np.array(values) for values in zip(*points, strict=True))
    slope, offset = np.polyfit(errors, costs, 1)
    inside = errors[0] <= math.log(error) <= errors[-1]
    return math.exp(np.interp(math.log(error), errors, costs) if inside else slope * math.log(error) + offset)


@command(__doc__)
@quick_option
@results_option
def main(quick: bool, results: Path) -> None:
    load_before = load()
    torch.set_num_threads(1)
    sections, ratios = [], {}
    for case in CASES[:1] if quick else CASES:
        runs = measure(*case)
        rows = [
            [
                "estimated" if first is None else f"{first:g}",
                safety,
                *(f"{run.nfe:.0f}: {run.mean:.1e}, {run.worst:.1e}" for run in runs[first, safety]),
            ]
            for first, safety in runs
        ]
        name = f"{case[0]}, guidance {case[1]:g}"
        sections += [
            f"## {name}, {case[3]} batches of {case[2]}\n\n"
            f"Evaluations of a pair: mean error, largest error of a sample",
            table(["first step", "safety", *(f"{tolerance:g}" for tolerance in TOLERANCES)], rows),
        ]
        ratios[name] = {
            control: [
                float(
                    np.exp(
                        np.mean(
                            [np.log(cost_at(runs[control], getattr(base, of), of) / base.nfe) for base in runs[DEFAULT]]
                        )
                    )
                )
                for of in ("mean", "worst")
            ]
            for control in runs
        }
    rows = []
    for control in CONTROLS:
        cells = [ratios[name][control] for name in ratios]
        mean, worst = (math.exp(sum(math.log(cell[i]) for cell in cells) / len(cells)) for i in (0, 1))
        rows.append(
            [
                "estimated" if control[0] is None else f"{control[0]:g}",
                control[1],
                f"{mean:.2f} | {worst:.2f}".replace(" | ", " / "),
                *(f"{cell[0]:.2f} / {cell[1]:.2f}" for cell in cells),
            ]
        )
    sections.insert(
        0,
        "Evaluations at equal error, as a ratio to torchdiffeq's defaults: by the mean error / by the largest error "
        "of a sample. Geometric means over tolerances.\n\n" + table(["first step", "safety", "all", *ratios], rows),
    )
    publish(results, "ground-truth", "Ground truth by step control", sections, quick=quick, load_before=load_before)


if __name__ == "__main__":
    main()
