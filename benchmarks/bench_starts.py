"""Which fixed solver a distillation should start from: PSNR on unseen pairs against evaluations on training pairs.

BNS with a free beginning by Levenberg-Marquardt with growing batches, on flow-matching digits, from families that
differ in the PSNR they start at and in their structure.

python benchmarks/bench_starts.py    # resumes
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator import plugins
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from solvers.distil.drive import drive
from solvers.distil.methods.base import LossQuery, NormalQuery, Problem, Query
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.normal_equations import NormalEquations, normal_equations
from solvers.families import GridSolver
from solvers.families.bns import BNS
from solvers.grids import Grid
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import NSSolver

TRAIN, UNSEEN = 128, 128
STARTS: tuple[tuple[str, dict[str, Any], Grid], ...] = (
    ("adams_bashforth", {"steps_back": 3}, Grid("warped", 2.0, 1.4)),
    ("adams_bashforth", {"steps_back": 4}, Grid("warped", 2.0, 1.4)),
    ("adams_bashforth", {"steps_back": 2}, Grid("warped", 1.6, 1.2)),
    ("dpmpp_2m", {}, Grid("warped", 1.8, 1.4)),
    ("midpoint", {}, Grid("warped", 1.6, 1.2)),
    ("midpoint", {}, Grid()),
    ("euler", {}, Grid("warped", 1.2, 1.0)),
)
"""Each on its best warped grid at NFE 8, and Midpoint on the uniform one too."""

MARKS = {8: (2_000, 10_000, 20_000, 40_000), 16: (10_000, 20_000, 40_000, 120_000)}
"""Evaluations at which the PSNR is reported, by NFE."""


class Digits:
    """Pairs of the digits model, the first ones for training."""

    def __init__(self) -> None:
        self.model = ZooModel("digits_fm_ot")
        self.labels = torch.arange(TRAIN + UNSEEN) % 10
        self.x0 = torch.from_numpy(noise(5, range(TRAIN + UNSEEN), self.model.shape))
        self.x1 = solve(self.model.field(self.labels, 1.0), self.x0, 1e-5, 1e-5).x1.float()

    @torch.no_grad()
    def psnr(self, solver: NSSolver) -> float:
        """Mean PSNR on unseen pairs, dB."""
        samples = solver.sample(self.model.field(self.labels[TRAIN:], 1.0), self.x0[TRAIN:])
        return float(psnr_db(per_sample_mse(samples, self.x1[TRAIN:]), 2.0).mean())

    @torch.no_grad()
    def answer(self, query: Query) -> NormalEquations | float:
        """Normal equations or losses on training pairs."""
        assert isinstance(query, NormalQuery | LossQuery)
        labels, x0, x1 = self.labels[query.indices], self.x0[query.indices], self.x1[query.indices]
        if isinstance(query, LossQuery):
            samples = query.solver.sample(self.model.field(labels, 1.0), x0)
            return float(psnr_loss(samples, x1).double().mean())
        return normal_equations(
            query.solver,
            lambda rows: self.model.field(labels[rows], 1.0),
            x0,
            x1,
            memory_bytes=2**28,
            jacobian=query.jacobian,
            free=query.free,
        )


def distil(digits: Digits, start: GridSolver, seed: int, most: int) -> list[tuple[int, float]]:
    """Evaluations spent and PSNR on unseen pairs, before the first and after each iteration."""
    method = LevenbergMarquardt(
        batch_size=TRAIN, first_batch_size=8, batch_growth=1.15, iterations=1000, seed=seed, training_pairs=TRAIN
    )
    family = BNS(beginning="free")
    problem = Problem(family, digits.model.scheduler)
    state = method.begin(family.start(start, digits.model.scheduler))
    history = [(0, digits.psnr(start.to_ns(digits.model.scheduler)))]
    while state.evaluations < most and state.status == "running":
        state = drive(method.iterate(state, 1, problem), digits.answer)
        parameters = torch.tensor(state.parameters, dtype=torch.float64)
        history.append((state.evaluations, digits.psnr(problem.solver(parameters).detach())))
    return history


def best_within(history: Sequence[Sequence[float]], evaluations: int) -> float:
    return max(psnr for spent, psnr in history if spent <= evaluations)


@command(__doc__)
@click.option("--storage", default="bespoke-data/benchmarks/starts", type=Path, help="Folder for finished runs.")
@click.option("--seeds", default=2, help="Number of seeds.")
@quick_option
@results_option
def main(storage: Path, seeds: int, quick: bool, results: Path) -> None:
    torch.set_num_threads(1)
    before, digits, sections = load(), Digits(), []
    storage.mkdir(parents=True, exist_ok=True)
    for nfe, marks in list(MARKS.items())[: 1 if quick else None]:
        rows = []
        for name, options, grid in STARTS[: 2 if quick else None]:
            start = GridSolver(plugins.build("families", name, options), nfe, grid)
            histories = []
            for seed in range(1 if quick else seeds):
                path = storage / f"nfe{nfe}-{start.family.label}-{grid.label}-{seed}.json".replace(" ", "-")
                if not path.exists():
                    path.write_text(json.dumps(distil(digits, start, seed, marks[-1])), encoding="utf-8")
                histories.append(json.loads(path.read_text(encoding="utf-8")))
            reached = [
                f"{statistics.mean(values):.1f} ({min(values):.1f})"
                for values in ([best_within(history, mark) for history in histories] for mark in marks)
            ]
            rows.append([start.family.label, grid.label, f"{histories[0][0][1]:.1f}", *reached])
            click.echo(rows[-1])
        heading = ["family", "grid", "start", *(f"{mark:,}" for mark in marks)]
        sections += [f"NFE {nfe}, PSNR in dB, mean over seeds and lowest, by evaluations:", table(heading, rows)]
    publish(results, "starts", "Starts of a distillation", sections, quick=quick, load_before=before)


if __name__ == "__main__":
    main()
