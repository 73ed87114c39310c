"""What NSSolver costs over the bare model calls that it makes, and diffusers' DPMSolverMultistepScheduler beside it.

The solver is a dense theta, as a distilled one is: no weight is zero. Networks are those of the zoo, and perceptrons
of several widths, so that calls of several lengths meet states of several sizes: a perceptron does less arithmetic for
each number of the state than any convolutional network or transformer. A block of 32 MiB is freed beforehand, as any
network does whose activations are larger than its states: malloc then keeps what is freed, and page faults are not
measured.

CPU seconds are compared where --clock is cpu: they suffer less from whatever else the machine does.

python benchmarks/bench_sampling_overhead.py
python benchmarks/bench_sampling_overhead.py --clock wall --rounds 31
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import DPMSolverMultistepScheduler
from publishing import command, load, publish, quick_option, results_option, table
from timing import paired_ratio
from torch import Tensor

from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.models.zoo import ZooModel
from solvers import NSSolver

CASES = (
    (64, 64, 256),
    (64, 64, 2048),
    (64, 768, 1024),
    (64, 3072, 256),
    (64, 3072, 1024),
    (64, 3072, 2048),
    (16, 12288, 1024),
    (64, 12288, 1024),
)
"""Batch, dimensions of a sample, width of the network."""

ZOO = (("digits_fm_ot", 512), ("cifar10_gray16_fm_ot", 4), ("cifar10_gray16_fm_ot", 64), ("spoken_digits_fm_ot", 8))
"""Model, batch."""

QUICK = CASES[1:6:2]
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Case:
    """Samplers of the same network from the same noise, with as many calls."""

    name: str
    x0: Tensor
    net: Callable[[Tensor], Tensor]
    nfe: int

    @classmethod
    def of(cls, batch: int, dimensions: int, width: int, nfe: int) -> Case:
        net = torch.nn.Sequential(
            torch.nn.Linear(dimensions, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, dimensions),
        )
        name = f"perceptron of width {width}, {batch} x {dimensions}"
        return cls(name, torch.randn(batch, dimensions), net.requires_grad_(False), nfe)

    @classmethod
    def of_zoo(cls, weights: str, batch: int, nfe: int) -> Case:
        model = ZooModel(weights)
        speech = SpokenDigits()
        labels = torch.arange(batch) % 10
        condition = speech.infilling(speech.conditions(0, range(batch))) if model.rate else labels
        field, half = model.field(condition, 1.0), torch.tensor(0.5, dtype=torch.float64)
        return cls(f"{weights}, {batch}", torch.randn(batch, *model.shape), lambda x: field(x, half), nfe)

    def bare(self) -> None:
        for _ in range(self.nfe):
            self.net(self.x0)

    def ns_solver(self, solver: NSSolver) -> Callable[[], object]:
        return lambda: solver.sample(lambda x, t: self.net(x), self.x0)  # type: ignore[arg-type]

    def dpm_solver(self) -> Callable[[], object]:
        """The scheduler's own loop, as a pipeline writes it."""
        scheduler = DPMSolverMultistepScheduler(solver_order=2)

        def run() -> Tensor:
            scheduler.set_timesteps(self.nfe)
            x = self.x0
            for t in scheduler.timesteps:
                x = scheduler.step(self.net(x), t, x, return_dict=False)[0]
            return x

        return run


def dense_theta(nfe: int) -> NSSolver:
    """A solver with no weight of zero."""
    generator = torch.Generator().manual_seed(0)
    return NSSolver.from_flat(torch.rand(nfe * (nfe + 5) // 2 + 1, generator=generator, dtype=torch.float64))


def seconds(
    alternatives: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each in every round, taken in turns."""
    for run in alternatives.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            begin = clock()
            run()
            found[name].append(clock() - begin)
    return found


@command(__doc__)
@click.option("--nfe", default=8, help="Model calls a sample.")
@click.option("--rounds", default=21, help="Times each is run.")
@click.option("--clock", default="cpu", type=click.Choice(list(CLOCKS)), help="What is measured.")
@quick_option
@results_option
@torch.no_grad()
def main(nfe: int, rounds: int, clock: str, quick: bool, results: Path) -> None:
    torch.set_num_threads(1)
    load_before = load()
    keep_freed_memory()
    solver = dense_theta(nfe)
    rows = []
    cases = [partial(Case.of, *case) for case in (QUICK if quick else CASES)]
    cases += [partial(Case.of_zoo, *case) for case in (ZOO[:1] if quick else ZOO)]
    for make in cases:
        case = make(nfe=nfe)
        found = seconds(
            {"bare": case.bare, "ns": case.ns_solver(solver), "dpm": case.dpm_solver()}, rounds, CLOCKS[clock]
        )
        call = statistics.median(found["bare"]) / nfe
        ratios = [paired_ratio(found[name], found["bare"]) for name in ("ns", "dpm")]
        added = [(ratio - 1) * call * 1e3 for ratio in ratios]
        rows.append(
            [
                case.name,
                f"{case.x0.numel() * 4 / 1e6:.2f}",
                f"{call * 1e3:.2f}",
                *(f"{ratio:.3f}" for ratio in ratios),
                *(f"{ms:.3f}" for ms in added),
            ]
        )
        click.echo("  ".join(rows[-1]))
    heading = [
        "network and batch",
        "state, MB",
        "call (ms)",
        "NSSolver / bare",
        "DPM++(2M) / bare",
        "NSSolver adds (ms a call)",
    ]
    publish(
        results,
        "sampling-overhead",
        f"What sampling costs over {nfe} bare model calls",
        [
            f"Medians over {rounds} interleaved rounds of ratios taken within a round, {clock} seconds, one thread, "
            f"float32, dense theta of NFE {nfe}.",
            table([*heading, "NSSolver adds (ms a call)", "DPM++(2M) adds (ms a call)"], rows),
        ],
        quick=quick,
        load_before=load_before,
    )


def keep_freed_memory() -> None:
    """Free a large block: glibc's malloc then keeps blocks up to its size instead of giving them back each time."""
    torch.empty(32 * 2**20 - 4096, dtype=torch.uint8)


if __name__ == "__main__":
    main()
