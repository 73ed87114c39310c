"""One theta for a range of guidance scales against a separate theta for each scale, at equal total bill.

The range is learned on five scales, each with as many pairs as a separate theta has, and in all for no more than five
separate ones cost. PSNR is also measured at two scales that the range was not learned on, against a theta learned at
these. 'converged' is a theta of one scale with many pairs and iterations; 'constant' is one solver for all scales,
learned on the same five.

python benchmarks/bench_guidance_range.py                          # about an hour on one core; resumes with --storage
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator import plugins
from orchestrator.hosts.distillation import mean_psnr
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import AtScale, LearnedRun, PairSets, State
from orchestrator.hosts.settings import HostSettings
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage, digest_of
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import UNIFORM
from solvers.guided import learning_scales
from solvers.ns import NSSolver

RANGE = (1.0, 5.0)
UNSEEN = (1.5, 4.5)
LABELS: dict[str, Any] = {"name": "labels", "options": {"classes": 10}}
TEST_SEED, VALIDATION_SEED, FIRST_TRAINING_SEED = 0, 1, 2


@dataclass(frozen=True)
class Size:
    """Pairs of each set, and the iterations and batches of a run.

    Attributes:
        train, validation: Pairs per guidance scale, at tolerance ``tolerance``.
        iterations, largest, first, growth: Of Levenberg-Marquardt.
    """

    train: int
    validation: int
    iterations: int
    largest: int
    first: int | None
    growth: float
    tolerance: float = 1e-5


BUDGETED = Size(train=48, validation=32, iterations=12, largest=48, first=8, growth=1.2)
RANGED = Size(train=48, validation=32, iterations=17, largest=48, first=4, growth=1.16)
"""As for one scale, but smaller batches: five scales determine twice as many numbers as one."""

CONVERGED = Size(train=192, validation=64, iterations=18, largest=64, first=8, growth=1.25)
RANGED_CONVERGED = Size(train=192, validation=64, iterations=30, largest=64, first=4, growth=1.16)


@dataclass
class Learned:
    """One distilled theta: its solver at each scale asked for, and its bill in evaluations."""

    solvers: dict[float, NSSolver]
    evaluations: int


@dataclass
class Bench:
    """A host with one model, and the pair sets made so far."""

    storage: Storage
    nfe: int
    weights: str = "digits_fm_ot"
    names: dict[tuple[float, int, int, float], tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = HostSettings(adapter="zoo", options={"weights": self.weights}, storage=self.storage.root)
        self.pool = LocalPool(Host(settings))
        self.facts = self.pool.call(Request.of(HostProtocol.facts))
        self.content = plugins.build("datasets", LABELS["name"], LABELS["options"]).content

    def pairs(self, scale: float, seed: int, count: int, tolerance: float) -> tuple[str, int]:
        """The name of a pair set, and the evaluations that it took."""
        key = (scale, seed, count, tolerance)
        if key not in self.names:
            spec = PairSpec(
                model_digest=self.facts.digest,
                conditioning=LABELS,
                content=self.content,
                guidance_scale=scale,
                shape=self.facts.shape,
                seed=seed,
                count=count,
                batch_size=16,
                shard_size=256,
                rtol=tolerance,
                atol=tolerance,
                device_class=self.facts.device_class,
            )
            ensure_pairs(self.storage, [spec], self.pool, wait=True, announce=lambda sentence: None)
            self.names[key] = (spec.name, PairStore(self.storage, spec).evaluations())
        return self.names[key]

    def learn(self, family: str, options: dict[str, Any], scales: Sequence[float], seed: int, size: Size) -> Learned:
        """Distil on these scales; the iterate is the best by mean validation PSNR."""
        train = [self.pairs(scale, FIRST_TRAINING_SEED + seed, size.train, size.tolerance) for scale in scales]
        valid = [self.pairs(scale, VALIDATION_SEED, size.validation, size.tolerance) for scale in scales]
        method = LevenbergMarquardt(
            iterations=size.iterations,
            batch_size=size.largest,
            first_batch_size=size.first,
            batch_growth=size.growth,
            training_pairs=size.train,
            seed=seed,
        )
        run = LearnedRun(family=family, options=options, sigma0=1.0, train=sets(scales, train), method=method)
        start = run.build().start(GridSolver(Midpoint(), self.nfe, UNIFORM), self.facts.scheduler)
        state: State = method.begin(start)
        while state.status == "running":
            step = Request.of(HostProtocol.advance, run=run, state=state, steps=1, validation=sets(scales, valid))
            state = self.pool.call(step)
        spent = method.evaluations(state, self.nfe)[0] + sum(evaluations for _, evaluations in [*train, *valid])
        spent += len(state.validated) * size.validation * self.nfe * len(scales)
        best = state.best["parameters"]
        asked = scales if len(scales) == 1 else sorted({*scales, *UNSEEN})
        return Learned({scale: run.solver(best, self.facts.scheduler, scale) for scale in asked}, spent)

    def row(
        self,
        label: str,
        seed: int,
        size: Size,
        test: int,
        shown: Sequence[float],
        measure: Callable[[], tuple[dict[float, float], int]],
    ) -> list[str]:
        """One row of the table, from the storage if an earlier command has made it."""
        content = [self.weights, self.nfe, label, seed, vars(size), test, shown]
        key = f"benchmarks/guidance_range/{digest_of(content)}.json"
        if not self.storage.exists(key):
            psnr, evaluations = measure()
            row = [label, str(seed), *(f"{psnr[scale]:.2f}" for scale in shown), f"{evaluations:,}"]
            self.storage.write_json(key, row)
        row = list(self.storage.read_json(key))
        click.echo(" | ".join(row))
        return row

    def psnr(self, learned: Learned, count: int) -> dict[float, float]:
        """Mean PSNR on test pairs at every scale, dB."""
        return {
            scale: mean_psnr(solver, self.pairs(scale, TEST_SEED, count, 1e-7)[0], self.pool.gather)
            for scale, solver in learned.solvers.items()
        }


def sets(scales: Sequence[float], names: Sequence[tuple[str, int]]) -> PairSets:
    if len(scales) == 1:
        return names[0][0]
    return tuple(AtScale(scale, name) for scale, (name, _) in zip(scales, names, strict=True))


def rows_of(bench: Bench, seeds: Sequence[int], test: int, sizes: tuple[Size, Size, Size, Size]) -> list[list[str]]:
    """Table rows: PSNR at every scale and the bill, for each alternative and seed."""
    ranged, budgeted, ranged_converged, converged = sizes
    learned_on = learning_scales(RANGE)
    shown = sorted({*learned_on, *UNSEEN})
    guided = {"low": RANGE[0], "high": RANGE[1], "beginning": "free"}
    free = {"beginning": "free"}

    def of_one(family: str, options: dict[str, Any], seed: int, size: Size) -> tuple[dict[float, float], int]:
        learned = bench.learn(family, options, learned_on, seed, size)
        return bench.psnr(learned, test), learned.evaluations

    def of_separate(seed: int, size: Size) -> tuple[dict[float, float], int]:
        each = {scale: bench.learn("bns", free, [scale], seed, size) for scale in shown}
        psnr = {scale: bench.psnr(learned, test)[scale] for scale, learned in each.items()}
        return psnr, sum(each[scale].evaluations for scale in learned_on)

    cases = [
        case
        for seed in seeds
        for case in (
            ("one theta, linear", seed, ranged, partial(of_one, "bns_guided", guided, seed, ranged)),
            ("one theta, constant", seed, budgeted, partial(of_one, "bns", free, seed, budgeted)),
            ("separate", seed, budgeted, partial(of_separate, seed, budgeted)),
        )
    ]
    first = seeds[0]
    long = ranged_converged
    cases.append(("one theta, linear, converged", first, long, partial(of_one, "bns_guided", guided, first, long)))
    cases.append(("separate, converged", first, converged, partial(of_separate, first, converged)))
    return [bench.row(label, seed, size, test, shown, measure) for label, seed, size, measure in cases]


def differences(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """PSNR of one linear theta minus that of separate ones: the mean and the worst over seeds."""

    def of(label: str, seed: str) -> np.ndarray[Any, Any]:
        (row,) = [row for row in rows if row[0] == label and row[1] == seed]
        return np.array([float(cell) for cell in row[2:-1]])

    seeds = sorted({row[1] for row in rows})
    linear = np.stack([of("one theta, linear", seed) for seed in seeds])
    first, converged = seeds[0], of("separate, converged", seeds[0])
    against = [
        ("at equal bill", "separate", linear - np.stack([of("separate", seed) for seed in seeds])),
        ("at equal bill", "separate, converged", linear - converged),
        ("converged", "separate, converged", of("one theta, linear, converged", first)[None] - converged),
    ]
    return [
        [one, other, name, *(f"{value:+.2f}" for value in getattr(values, name)(axis=0))]
        for one, other, values in against
        for name in (("mean", "min") if len(values) > 1 else ("mean",))
    ]


@command(__doc__)
@click.option("--nfe", type=int, default=8, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of training pairs and batches.")
@click.option("--test-pairs", type=int, default=512, show_default=True, help="Unseen pairs per scale, at 1e-7.")
@click.option("--storage", help="Where pairs are kept; a temporary folder by default.")
@quick_option
@results_option
def main(nfe: int, seeds: str, test_pairs: int, storage: str | None, quick: bool, results: Path) -> None:
    torch.set_num_threads(1)
    before = load()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Storage.at(storage or temporary), nfe)
        sizes = (RANGED, BUDGETED, RANGED_CONVERGED, CONVERGED)
        numbers = [int(seed) for seed in seeds.split(",")]
        if quick:
            test_pairs, numbers = 32, numbers[:1]
            few = dataclasses.replace(BUDGETED, iterations=2)
            sizes = (few, few, few, dataclasses.replace(few, iterations=3))
        rows = rows_of(bench, numbers, test_pairs, sizes)
    scales = [f"w={scale:g}" for scale in sorted({*learning_scales(RANGE), *UNSEEN})]
    heading = ["theta", "seed", *scales, "evaluations for w=1..5"]
    parts = [
        f"PSNR (dB) on {test_pairs} unseen pairs at 1e-7, {bench.weights}, NFE {nfe}, beginning free. The bill holds "
        f"pairs, validation pairs, distillation and validation; a velocity with guidance is one evaluation.",
        table(heading, rows),
        "One linear theta minus separate ones (dB); the mean and the worst over seeds:",
        table(["one theta", "against", "seeds", *scales], differences(rows)),
    ]
    publish(
        results, "guidance-range", "One theta for a range of guidance scales", parts, quick=quick, load_before=before
    )


if __name__ == "__main__":
    main()
