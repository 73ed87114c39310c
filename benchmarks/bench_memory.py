"""Peak memory of one distillation step: Adam, Adam with activation checkpointing, and Levenberg-Marquardt.

Adam's step is the gradient of the PSNR loss of a batch; with checkpointing (NSSolver.sample(..., checkpoint=True)) the
network's activations are recomputed in the backward pass. Levenberg-Marquardt's step is the normal equations of the
same batch with a budget (normal_equations(memory_bytes=...)), which bounds the memory beside the network's activations.
Models: the zoo's digits, and a convolutional network of random weights on 3 x 32 x 32 states.

Every case runs in a fresh process. Peak RSS is the peak of resident memory minus its value before the step (after
imports and a warm-up, with model and pairs loaded). Tensors are counted in a second step of the same process: the most
bytes alive at once, and the bytes alive between forward and backward pass. A busy machine does not affect memory, but
it affects the seconds, which are of one step. Linux only.

python benchmarks/bench_memory.py
python benchmarks/bench_memory.py --models conv --nfe 16 --conv-batch 32
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import click
from memory_case import Case, Measured
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator.progress import bar

MB = 2**20
MODELS = ("digits", "conv")
ADAM = ("adam", "adam, checkpointed")
BUDGETS = {"digits": (1, 8, 64), "conv": (8, 32, 128)}
"""Budgets of the normal equations, 2^20 bytes."""


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """A click callback for positive integers separated by commas."""
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers; use e.g. 4,8,16")
    return [int(part) for part in parts]


def cases(models: Sequence[str], nfe: Sequence[int], batches: dict[str, int]) -> list[Case]:
    """Every method at every NFE on every model."""
    planned = []
    for model, n in product(models, nfe):
        planned += [Case(model, method, n, batches[model]) for method in ADAM]
        planned += [Case(model, "levenberg-marquardt", n, batches[model], mb * MB) for mb in BUDGETS[model]]
    return planned


def run(case: Case) -> Measured:
    """Measure the case in a process of its own."""
    call = [sys.executable, str(Path(__file__).parent / "memory_case.py"), json.dumps(asdict(case))]
    # One arena, so that memory kept by another thread's arena is not attributed to the step.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"{case} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout))


def row(case: Case, measured: Measured, adam: Measured) -> list[str]:
    """A row of the table; ``adam`` is the measurement of plain Adam for the same model and NFE."""
    budget = f"{case.memory_bytes / MB:.0f}" if case.memory_bytes else ""
    held = "" if measured.held is None else f"{measured.held / MB:.1f}"
    return [
        f"{case.model}, {case.batch} pairs",
        str(case.nfe),
        case.method,
        budget,
        f"{measured.peak_rss / MB:.1f}",
        f"{measured.peak_tensors / MB:.1f}",
        f"{measured.peak_tensors / adam.peak_tensors:.2f} x",
        held,
        f"{measured.seconds:.2f}",
    ]


@command(__doc__)
@click.option("--models", default=",".join(MODELS), help="digits, conv, or both.")
@click.option("--nfe", default="4,8,16", callback=numbers, help="Evaluations per sample.")
@click.option("--batch", default=64, help="Pairs per step on digits.")
@click.option("--conv-batch", default=8, help="Pairs per step on the convolutional network.")
@quick_option
@results_option
def main(models: str, nfe: list[int], batch: int, conv_batch: int, quick: bool, results: Path) -> None:
    load_before = load()
    chosen = models.split(",")
    unknown = [model for model in chosen if model not in MODELS]
    if unknown:
        raise click.BadParameter(f"unknown model {unknown[0]!r} in --models; choose from {', '.join(MODELS)}")
    if quick:
        nfe, conv_batch = nfe[:1], min(conv_batch, 4)
    planned = cases(chosen, nfe, {"digits": batch, "conv": conv_batch})
    rows: list[list[str]] = []
    plain: dict[tuple[str, int], Measured] = {}
    with bar(len(planned), "case", "memory") as progress:
        for case in planned:
            measured = run(case)
            # Plain Adam comes first for each model and NFE.
            rows.append(row(case, measured, plain.setdefault((case.model, case.nfe), measured)))
            progress.update()
    note = (
        "Memory above the baseline, in 2^20 bytes. The ratio is that of tensors to plain Adam's. 'Held' is kept for "
        "the backward\npass. A budget does not include the network's own activations, of up to 512 samples per call."
    )
    heading = ["model", "NFE", "method", "budget", "peak RSS", "peak tensors", "to Adam's", "held", "seconds"]
    publish(
        results,
        "memory",
        "Peak memory of a distillation step",
        [note, table(heading, rows)],
        quick=quick,
        load_before=load_before,
    )


if __name__ == "__main__":
    main()
