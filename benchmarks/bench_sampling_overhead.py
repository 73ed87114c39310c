"""Overhead of NSSolver over the bare model calls that it makes, beside that of diffusers' DPMSolverMultistepScheduler.

The solver is a dense theta, like a distilled one: no weight is zero. The networks are those of the zoo and perceptrons
of several widths, so that calls of several durations are combined with states of several sizes. A perceptron does less
arithmetic per number of the state than any convolutional network or transformer. A block of 32 MiB is freed beforehand,
as by any network whose activations are larger than its states: malloc then keeps freed blocks, and page faults are
not measured.

With --clock cpu, CPU seconds are compared: other work of the machine affects them less.

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
    """Samplers of one network, from the same noise and with the same number of calls."""

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
        """The scheduler's loop, as in a pipeline."""
        scheduler = DPMSolverMultistepScheduler(solver_order=2)

        def run() -> Tensor:
            scheduler.set_timesteps(self.nfe)
            x = self.x0
            for t in scheduler.timesteps:
                x = scheduler.step(self.net(x), t, x, return_dict=False)[0]
            return x

        return run


def dense_theta(nfe: int) -> NSSolver:
    """A solver without zero weights."""
    generator = torch.Generator().manual_seed(0)
    return NSSolver.from_flat(torch.rand(nfe * (nfe + 5) // 2 + 1, generator=generator, dtype=torch.float64))


def seconds(
    alternatives: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each alternative in every round; the alternatives take turns."""
    for run in alternatives.values():
        run()
    timings: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            begin = clock()
            run()
            timings[name].append(clock() - begin)
    return timings


@command(__doc__)
@click.option("--nfe", default=8, help="Model calls per sample.")
@click.option("--rounds", default=21, help="Runs of each alternative.")
@click.option("--clock", default="cpu", type=click.Choice(list(CLOCKS)), help="Clock to measure with.")
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
        timings = seconds(
            {"bare": case.bare, "ns": case.ns_solver(solver), "dpm": case.dpm_solver()}, rounds, CLOCKS[clock]
        )
        call = statistics.median(timings["bare"]) / nfe
        ratios = [paired_ratio(timings[name], timings["bare"]) for name in ("ns", "dpm")]
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
        "NSSolver adds (ms per call)",
    ]
    publish(
        results,
        "sampling-overhead",
        f"Overhead of sampling over {nfe} bare model calls",
        [
            f"Medians over {rounds} interleaved rounds of ratios taken within a round, {clock} seconds, one thread, "
            f"float32, dense theta of NFE {nfe}.",
            table([*heading, "NSSolver adds (ms per call)", "DPM++(2M) adds (ms per call)"], rows),
        ],
        quick=quick,
        load_before=load_before,
    )


def keep_freed_memory() -> None:
    """Free a large block: glibc's malloc then keeps freed blocks up to this size instead of returning them."""
    torch.empty(32 * 2**20 - 4096, dtype=torch.uint8)


if __name__ == "__main__":
    main()
