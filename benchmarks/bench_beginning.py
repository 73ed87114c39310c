"""What a learned beginning adds to BNS: held, its first time alone, and its first state too, at equal iterations.

Every run starts from the best of the shortlist of fixed solvers on 16 training pairs and distils by Levenberg-Marquardt
with growing batches; its last iterate is scored on unseen pairs of more accurate ground truth.

python benchmarks/bench_beginning.py                                                     # digits: a quarter of an hour
python benchmarks/bench_beginning.py --models cifar10_gray16_fm_ot,spoken_digits_fm_ot --nfe 4 --seeds 0 \\
    --pairs 32 --first-batch 4 --iterations 12 --test-pairs 64 --name beginning-larger
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import torch
from bench_distillation import CONDITIONING, LABELS, split
from publishing import command, load, publish, results_option, table

from orchestrator import plugins
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.distil.drive import drive
from solvers.distil.methods.base import LossQuery, NormalQuery, Problem, Query
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt, LMState
from solvers.distil.normal_equations import NormalEquations, normal_equations
from solvers.families.bns import BNS, LEFT_OUT, Beginning
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import NSSolver
from sweeps.distil.starts import shortlist

TRAIN_TOLERANCE, TEST_TOLERANCE = 1e-5, 1e-7
RACE_PAIRS = 16
MEMORY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Subject:
    """A model with its pairs."""

    model: ZooModel
    guidance_scale: float
    train: PairSet
    test: PairSet

    @torch.no_grad()
    def mse(self, solver: NSSolver, pairs: PairSet) -> torch.Tensor:
        """Mean squared error of each sample, shape (len(pairs),)."""
        parts = [pairs.select(slice(first, first + 256)) for first in range(0, len(pairs), 256)]
        samples = [solver.sample(self.model.field(part.condition, self.guidance_scale), part.x0) for part in parts]
        return torch.cat([per_sample_mse(s, part.x1) for s, part in zip(samples, parts, strict=True)])

    def psnr(self, solver: NSSolver, pairs: PairSet) -> float:
        return float(psnr_db(self.mse(solver, pairs), self.model.data_range).mean())

    def start(self, nfe: int) -> NSSolver:
        """The best of the shortlist."""
        few = self.train.select(list(range(RACE_PAIRS)))
        return max((c.solver for c in shortlist(nfe, self.model.scheduler)), key=lambda solver: self.psnr(solver, few))

    @torch.no_grad()
    def answer(self, query: Query) -> NormalEquations | float:
        assert isinstance(query, NormalQuery | LossQuery)
        pairs = self.train.select(query.indices)
        if isinstance(query, LossQuery):
            samples = query.solver.sample(self.model.field(pairs.condition, self.guidance_scale), pairs.x0)
            return float(psnr_loss(samples, pairs.x1).double().mean())
        return normal_equations(
            query.solver,
            lambda rows: self.model.field(pairs.condition[rows], self.guidance_scale),
            pairs.x0,
            pairs.x1,
            memory_bytes=MEMORY_BYTES,
            jacobian=query.jacobian,
            free=query.free,
        )


@dataclass(frozen=True)
class Score:
    """The end of one run."""

    psnr: float
    first_time: float
    first_weight: float
    evaluations: int


def run(subject: Subject, start: NSSolver, beginning: Beginning, method: LevenbergMarquardt) -> Score:
    """Distil from ``start`` to the last iteration."""
    family, scheduler = BNS(beginning=beginning), subject.model.scheduler
    state = method.begin(family.start_from(start, scheduler))
    while state.status == "running":
        state = drive(method.iterate(state, 1, Problem(family, scheduler)), subject.answer)
        state = state.with_validation(0.0)
    assert isinstance(state, LMState)
    solver = family.to_ns(torch.tensor(state.parameters, dtype=torch.float64), scheduler, 1.0)
    psnr = subject.psnr(solver, subject.test)
    return Score(psnr, float(solver.times[0]), float(solver.a[0]), state.evaluations)


def subject_of(name: str, guidance_scale: float, seed: int, pairs: int, test_pairs: int, storage: Storage) -> Subject:
    """The model, training pairs of this seed, and test pairs that all seeds share."""
    pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": name}, storage=storage.root)))
    facts = pool.call(Request.of(HostProtocol.facts))
    conditioning = CONDITIONING.get(name, LABELS)

    def spec(stream: int, count: int, tolerance: float) -> PairSpec:
        return PairSpec(
            model_digest=facts.digest,
            conditioning=conditioning,
            content=plugins.build("datasets", conditioning["name"], conditioning["options"]).content,
            guidance_scale=guidance_scale,
            shape=facts.shape,
            seed=stream,
            count=count,
            batch_size=min(64, count),
            shard_size=64,
            rtol=tolerance,
            atol=tolerance,
            device_class=facts.device_class,
            trajectory=False,
        )

    specs = [spec(2 + seed, pairs, TRAIN_TOLERANCE), spec(1, test_pairs, TEST_TOLERANCE)]
    ensure_pairs(storage, specs, pool, wait=True, announce=click.echo)
    train, test = (PairStore(storage, each).load() for each in specs)
    return Subject(ZooModel(name), guidance_scale, train, test)


def summary(scores: dict[tuple[str, float, int, Beginning], list[Score]]) -> str:
    """Means over seeds, and the least gain of a seed over 'held'."""
    rows = []
    for name, scale, nfe in dict.fromkeys((name, scale, nfe) for name, scale, nfe, _ in scores):
        runs: dict[Beginning, list[Score]] = {b: scores[name, scale, nfe, b] for b in LEFT_OUT}
        gains = [[learned.psnr - held.psnr for learned, held in zip(runs[b], runs["held"], strict=True)] for b in runs]
        last = runs["free"][-1]
        rows.append(
            [
                f"{name}, guidance {scale:g}" if scale != 1 else name,
                nfe,
                *(f"{statistics.mean(score.psnr for score in of):.2f}" for of in runs.values()),
                *(f"{statistics.mean(gain):+.2f} ({min(gain):+.2f})" for gain in gains[1:]),
                f"{last.first_time:.3f}, {last.first_weight:.3f}",
                f"{runs['free'][-1].evaluations:,}",
            ]
        )
    heading = ["model", "NFE", *LEFT_OUT, "gain of time (least)", "gain of free (least)", "t_0, a_0", "evaluations"]
    return table(heading, rows)


@command(__doc__)
@click.option("--models", default="digits_fm_ot,digits_eps_vp,digits_fm_v_cs", callback=split(str))
@click.option("--guidance", default="1", callback=split(float), help="Guidance scales.")
@click.option("--nfe", default="3,4,6,8", callback=split(int))
@click.option("--seeds", default="0,1,2", callback=split(int), help="Each has its own training pairs.")
@click.option("--pairs", default=64, help="Training pairs, and the largest batch.")
@click.option("--first-batch", default=8)
@click.option("--growth", default=1.2)
@click.option("--iterations", default=15)
@click.option("--test-pairs", default=1024)
@click.option("--storage", default="", help="Folder for pairs; a temporary one by default.")
@click.option("--name", default="beginning", help="Name of the result file, after the date.")
@results_option
def main(
    models: Sequence[str],
    guidance: Sequence[float],
    nfe: Sequence[int],
    seeds: Sequence[int],
    pairs: int,
    first_batch: int,
    growth: float,
    iterations: int,
    test_pairs: int,
    storage: str,
    name: str,
    results: Path,
) -> None:
    torch.set_num_threads(1)
    before = load()
    scores: dict[tuple[str, float, int, Beginning], list[Score]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        store = Storage.at(storage or temporary)
        for model, scale, seed in product(models, guidance, seeds):
            subject = subject_of(model, scale, seed, pairs, test_pairs, store)
            method = LevenbergMarquardt(
                iterations=iterations,
                batch_size=pairs,
                first_batch_size=first_batch,
                batch_growth=growth,
                seed=seed,
                training_pairs=pairs,
            )
            for n in nfe:
                start = subject.start(n)
                for beginning in LEFT_OUT:
                    score = run(subject, start, beginning, method)
                    scores.setdefault((model, scale, n, beginning), []).append(score)
                    click.echo(f"{model} w={scale:g} NFE {n} seed {seed} {beginning}: {score}")
    text = (
        f"PSNR in dB on {test_pairs} unseen pairs at 1e-7 of the last iterate: {pairs} training pairs at 1e-5, "
        f"{iterations} iterations of Levenberg-Marquardt on {first_batch} to {pairs} pairs (growth {growth:g}), seeds "
        f"{', '.join(map(str, seeds))}. Gains over 'held' are means over the seeds, with the least in brackets. t_0, "
        f"a_0 and the evaluations of 'free' are those of the last seed."
    )
    publish(results, name, "A learned beginning", [text, summary(scores)], quick=False, load_before=before)


if __name__ == "__main__":
    main()
