"""Evaluations and error of ground truth on steps that a whole pair set shares, against adaptive steps.

Steps are chosen on four pairs per seed, by three seeds, and used for other pairs. The error is each sample's RMS
distance from a solution at 1e-7. "At equal error" compares the evaluations of a pair at the error that adaptive steps
reach at the same tolerance, by interpolation between tolerances on logarithmic axes; below 1 is cheaper, and the worst
of the seeds counts. The choice itself is listed apart. Orders of the multistep method are compared on steps of the same
number.

python benchmarks/bench_shared_steps.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from bench_ground_truth import Run, batches_of, cost_at
from publishing import command, load, publish, quick_option, results_option, table
from torch import Tensor

from orchestrator.pairs import ground_truth
from orchestrator.pairs.ground_truth import solve, solve_on_steps
from orchestrator.pairs.steps import SAMPLES, choose_steps, even_steps
from orchestrator.pairs.tolerance import ERROR_PER_TOLERANCE

CASES = (
    ("digits_fm_ot", 1.0, 32, 3),
    ("digits_fm_ot", 3.0, 32, 3),
    ("digits_eps_vp", 1.0, 32, 3),
    ("digits_fm_v_cs", 1.0, 32, 3),
    ("cifar10_gray16_fm_ot", 1.0, 8, 2),
)
"""Model, guidance scale, pairs of a batch, number of batches."""

TOLERANCES = (1e-3, 1e-4, 1e-5)
SEEDS = 3
ORDERS = (3, 4, 5)
COUNTS = (24, 32, 48, 64, 96)


def errors(solutions: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """RMS error per sample."""
    pairs = zip(solutions, references, strict=True)
    return torch.cat([(x - reference).flatten(1).square().mean(1).sqrt() for x, reference in pairs])


def run_of(nfe: float, error: Tensor) -> Run:
    """Evaluations with the mean and the largest error."""
    return Run(nfe, float(error.mean()), float(error.max()))


def shown(run: Run, tolerance: float) -> str:
    """Evaluations of a pair, and errors as multiples of the tolerance."""
    return f"{run.nfe:.0f}: {run.mean / tolerance:.1f}, {run.worst / tolerance:.1f}"


def ratio(runs: Sequence[Run], base: Sequence[Run], attribute: str) -> float:
    """Evaluations at the errors of ``base``, as the geometric mean of their ratios to those of ``base``."""
    ratios = [cost_at(list(runs), getattr(run, attribute), attribute) / run.nfe for run in base]
    return float(np.exp(np.mean(np.log(ratios))))


def measure(case: tuple[str, float, int, int], seeds: int) -> tuple[list[list[str]], list[str], list[list[str]]]:
    """Rows by tolerance, the ratios at equal error, and rows by order."""
    weights, scale, batch, count = case
    # The last batches are those of the seeds: their noise and conditions are not among the measured pairs.
    *batches, first = batches_of(weights, scale, batch, count + 1)
    references = [solve(field, x0, 1e-7, 1e-7).x1 for field, x0 in batches]
    adaptive, shared, rows = [], [[] for _ in range(seeds)], []
    for tolerance in TOLERANCES:
        solutions = [solve(field, x0, tolerance, tolerance) for field, x0 in batches]
        nfe = sum(solution.nfe for solution in solutions) / count
        adaptive.append(run_of(nfe, errors([solution.x1 for solution in solutions], references)))
        cells = [f"{tolerance:g}", shown(adaptive[-1], tolerance)]
        for seed in range(seeds):
            x0 = torch.randn(SAMPLES, *first[1].shape[1:], generator=torch.Generator().manual_seed(1000 + seed))
            field = batches_of(weights, scale, SAMPLES, 1)[0][0]
            chosen = choose_steps(field, x0, tolerance, tolerance)
            if chosen.steps is None:
                shared[seed].append(adaptive[-1])
                cells.append(f"adaptive ({chosen.evaluations:,})")
                continue
            error = errors([solve_on_steps(f, x, chosen.steps).x1 for f, x in batches], references)
            shared[seed].append(run_of(len(chosen.steps) - 1, error))
            cells.append(f"{shown(shared[seed][-1], tolerance)} ({chosen.evaluations:,})")
        rows.append(cells)
    worst = [max(ratio(runs, adaptive, of) for runs in shared) for of in ("mean", "worst")]
    truth = solve(field, x0, 1e-5, 1e-5, keep_errors=True)
    assert truth.errors is not None
    domain = field.scheduler.t_min, field.scheduler.t_max
    orders = []
    for order in ORDERS:
        with patch.object(ground_truth, "ORDER", order):
            runs = []
            for steps in (even_steps(truth.errors, domain, number) for number in COUNTS):
                error = errors([solve_on_steps(f, x, steps).x1 for f, x in batches], references)
                runs.append(run_of(len(steps) - 1, error))
        orders.append([str(order), *(f"{ratio(runs, [run], 'mean'):.2f}" for run in adaptive)])
    return rows, [f"{value:.2f}" for value in worst], orders


@command(__doc__)
@quick_option
@results_option
def main(quick: bool, results: Path) -> None:
    load_before = load()
    torch.set_num_threads(1)
    sections, summary = [], []
    for case in CASES[:1] if quick else CASES:
        rows, ratios, orders = measure(case, 1 if quick else SEEDS)
        name = f"{case[0]}, guidance {case[1]:g}"
        summary.append([name, *ratios])
        heads = [f"shared, seed {seed}" for seed in range(len(rows[0]) - 2)]
        sections += [
            f"## {name}, {case[3]} batches of {case[2]}\n\nEvaluations of a pair: mean error, largest error of a "
            f"sample, as multiples of the tolerance (evaluations of the choice)",
            table(["tolerance", "adaptive", *heads], rows),
            "Evaluations at the mean error of adaptive steps, as a ratio, by order of the multistep method",
            table(["order", *(f"{tolerance:g}" for tolerance in TOLERANCES)], orders),
        ]
    means = [math.exp(sum(math.log(float(row[i])) for row in summary) / len(summary)) for i in (1, 2)]
    summary.append(["all", *(f"{mean:.2f}" for mean in means)])
    sections.insert(
        0,
        f"Evaluations at equal error as a ratio to adaptive steps (first step 1e-3, safety 0.7), by the mean error and "
        f"by the largest error of a sample; geometric means over tolerances. Steps may err by half of "
        f"{ERROR_PER_TOLERANCE:g} times the tolerance on the pairs on which they are chosen.\n\n"
        + table(["model", "by the mean error", "by the largest error"], summary),
    )
    publish(results, "shared-steps", "Ground truth on shared steps", sections, quick=quick, load_before=load_before)


if __name__ == "__main__":
    main()
