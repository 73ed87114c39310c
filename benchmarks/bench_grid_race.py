"""Races against full searches: samples drawn, and the PSNR lost by their choice.

Among grids, within each of nine families: every grid of the default search is scored once on 256 pairs. Races on random
orders of these pairs then choose a grid; the loss is the difference from the best grid's mean over all pairs.

Among families and grids: the races for a distillation's baseline, against the best of nine families on all grids. On
the photographs all are scored on a few pairs, and the leaders and those that race on more.

python benchmarks/bench_grid_race.py    # resumes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator import plugins
from orchestrator.config.solvers import GridSearch
from orchestrator.hosts.conditioning import drawn
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.pool.requests import LocalPool
from orchestrator.randomness import noise
from solvers.grids import Grid
from solvers.losses import per_sample_mse, psnr_db
from solvers.ns import NSSolver
from sweeps.distil.starts import choose_starts, rivals, shortlist
from sweeps.point import SolverChoice
from sweeps.points.grid_search import full_search, raced_search
from sweeps.race import Candidate, race


class Case(NamedTuple):
    """A model, an NFE and a guidance scale, and the number of pairs; of all solvers first, if that is less."""

    weights: str
    nfe: int
    guidance_scale: float
    pairs: int
    all_pairs: int


WITHIN = (
    Case("digits_fm_ot", 4, 1.0, 256, 256),
    Case("digits_fm_ot", 8, 1.0, 256, 256),
    Case("digits_eps_vp", 8, 1.0, 256, 256),
    Case("digits_fm_v_cs", 8, 1.0, 256, 256),
)
"""Cases of the races within a family."""

ACROSS = (
    *(Case("digits_fm_ot", nfe, 1.0, 64, 64) for nfe in (4, 8, 16)),
    *(Case("digits_eps_vp", nfe, 1.0, 64, 64) for nfe in (4, 8, 16)),
    *(Case("digits_fm_v_cs", nfe, 1.0, 64, 64) for nfe in (4, 8, 16)),
    *(Case("digits_fm_ot", nfe, 3.0, 64, 64) for nfe in (4, 8, 16)),
    *(Case("cifar10_gray16_fm_ot", nfe, 1.0, 40, 8) for nfe in (4, 8, 16)),
)
"""Cases of the races over the shortlist."""

LEADERS = 50
"""Solvers that are scored on all pairs of a case where not all are."""

FAMILIES: tuple[tuple[str, dict[str, int]], ...] = (
    *((name, {}) for name in ("euler", "midpoint", "heun", "rk4", "ddim", "dpmpp_2m")),
    *(("adams_bashforth", {"steps_back": back}) for back in (2, 3, 4)),
)
"""Families of the full search, with their options."""

ORDERS = 40
"""Random orders of the pairs for each race."""

FEW = 3
"""Pairs for each candidate that a race over the shortlist may take at most."""


class KnownScores:
    """A host that answers a search from scores that are already known.

    Args:
        solvers: The candidates.
        scores: PSNR of each on each pair, (solvers, pairs), dB.
    """

    def __init__(self, solvers: Sequence[NSSolver], scores: npt.NDArray[np.float64]):
        self.rows = {solver.flat().numpy().tobytes(): row for solver, row in zip(solvers, scores, strict=True)}

    def score_thetas(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        return [self.rows[theta.tobytes()][list(indices)] for theta in thetas]

    def score(
        self, theta: npt.NDArray[np.float64], pairs: str, metrics: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float64]]:
        return {"psnr": self.rows[theta.tobytes()]}


class Scored(NamedTuple):
    """Solvers and their PSNR on each pair, (solvers, pairs), dB; NaN where a solver was not scored."""

    candidates: list[Candidate]
    scores: npt.NDArray[np.float64]

    def select(self, rows: Sequence[int]) -> Scored:
        return Scored([self.candidates[row] for row in rows], self.scores[list(rows)])

    def pool(self, order: npt.NDArray[np.int64]) -> LocalPool:
        """Hosts that know these scores, with the pairs in this order."""
        return LocalPool(KnownScores([candidate.solver for candidate in self.candidates], self.scores[:, order]))


def everything(case: Case) -> list[Candidate]:
    """All nine families on all grids, the shortlist and its rivals."""
    scheduler = ZooModel(case.weights).scheduler
    listed = [*shortlist(case.nfe, scheduler), *rivals(case.nfe, scheduler)]
    candidates = []
    for name, options in FAMILIES:
        label = plugins.build("families", name, options).label
        for grid in GridSearch().candidates():
            assert isinstance(grid, Grid)
            choice = SolverChoice(family=name, options=options, label=label, grid=grid)
            try:
                candidates.append(Candidate(choice=choice, solver=choice.solver(case.nfe, 1.0).to_ns(scheduler)))
            except ValueError:  # not a multiple of its evaluations per step, or steps indistinguishably close
                continue
    known = [candidate.choice for candidate in candidates]
    return [*candidates, *(candidate for candidate in listed if candidate.choice not in known)]


@torch.no_grad()
def scored(case: Case, storage: Path) -> Scored:
    """Scores of all solvers on the pairs of a case, kept in ``storage``."""
    candidates = everything(case)
    path = storage / f"{case.weights}-{case.nfe}-{case.guidance_scale:g}-{case.pairs}-{case.all_pairs}.npy"
    if path.exists():
        return Scored(candidates, np.load(path))
    model = ZooModel(case.weights)
    _, labels = drawn(model, plugins.build("datasets", "labels", {"classes": 10}), 5, list(range(case.pairs)))
    x0 = torch.from_numpy(noise(5, range(case.pairs), model.shape))
    blocks = [slice(first, first + 64) for first in range(0, case.pairs, 64)]
    fields = [model.field(labels[block], case.guidance_scale) for block in blocks]
    x1 = torch.cat([solve(f, x0[b], 1e-5, 1e-5).x1.float() for f, b in zip(fields, blocks, strict=True)])
    scores = np.full((len(candidates), case.pairs), np.nan)

    def score(rows: Sequence[int], first: int, stop: int) -> None:
        field = model.field(labels[first:stop], case.guidance_scale)
        for row in rows:
            mse = per_sample_mse(candidates[row].solver.sample(field, x0[first:stop]), x1[first:stop])
            scores[row, first:stop] = psnr_db(mse, model.data_range).numpy()

    score(range(len(candidates)), 0, case.all_pairs)
    if case.all_pairs < case.pairs:
        order = np.argsort(-np.nan_to_num(scores[:, : case.all_pairs].mean(axis=1), nan=-np.inf))
        leaders = {*order[:LEADERS].tolist(), *listed_rows(case, candidates)}
        score(sorted(leaders), case.all_pairs, case.pairs)
    np.save(path, scores)
    return Scored(candidates, scores)


def listed_rows(case: Case, candidates: Sequence[Candidate]) -> list[int]:
    """Positions of the shortlist and its rivals."""
    choices, scheduler = [candidate.choice for candidate in candidates], ZooModel(case.weights).scheduler
    return [choices.index(c.choice) for c in (*shortlist(case.nfe, scheduler), *rivals(case.nfe, scheduler))]


def means_of(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean of each solver; -inf if a score is missing or not finite."""
    means = scores.mean(axis=1)
    return np.where(np.isfinite(means), means, -np.inf)


def within(case: Case, orders: int, storage: Path) -> list[object]:
    """A row of the table of races within a family."""
    every, validation, one = scored(case, storage), f"validation-{case.pairs}", case.pairs * case.nfe
    losses, shares, finals = [], [], []
    for name, options in FAMILIES:
        own = every.select(
            [i for i, c in enumerate(every.candidates) if (c.choice.family, c.choice.options) == (name, options)]
        )
        means = means_of(own.scores)
        full = full_search(own.candidates, validation, case.pairs, own.pool(np.arange(case.pairs))).evaluations
        for seed in range(orders):
            pool = own.pool(np.random.default_rng(seed).permutation(case.pairs))
            winner, _, spent = raced_search(own.candidates, validation, case.pairs, pool)
            raced = race(own.candidates, validation, pool=pool, last_pairs=case.pairs, keep=3).evaluations
            shares.append(raced / (full - 3 * one))
            finals.append((spent - raced) / one)
            losses.append(float(means.max() - means[own.candidates.index(winner)]))
    p95, p99 = np.quantile(losses, [0.95, 0.99])
    missed = np.mean(np.array(losses) > 0.1)
    numbers = (f"{np.mean(losses):.3f}", f"{p95:.2f}", f"{p99:.2f}", f"{max(losses):.2f}", f"{missed:.1%}")
    return [case.weights, case.nfe, f"1/{1 / np.mean(shares):.0f}", f"{np.mean(finals):.1f}", *numbers]


def across(case: Case, orders: int, storage: Path) -> list[object]:
    """A row of the table of races over the shortlist."""
    every = scored(case, storage)
    means = means_of(every.scores)
    best = every.candidates[int(means.argmax())].choice
    listed = every.select(listed_rows(case, every.candidates))
    own = means_of(listed.scores)
    cells, scheduler = [], ZooModel(case.weights).scheduler
    for each in (FEW, None):
        most = None if each is None else each * case.nfe * len(listed.candidates)
        losses, spent = [], []
        for seed in range(orders):
            pool = listed.pool(np.random.default_rng(seed).permutation(case.pairs))
            chosen = choose_starts(
                case.nfe, scheduler, "train", pool=pool, last_pairs=case.pairs, most_evaluations=most
            )
            baseline = next(i for i, c in enumerate(listed.candidates) if c.choice == chosen.baseline.choice)
            losses.append(float(means.max() - own[baseline]))
            spent.append(chosen.evaluations)
        cells += [f"{np.mean(spent):,.0f}", f"{np.mean(losses):.2f}", f"{max(losses):.2f}"]
    return [
        case.weights,
        f"{case.guidance_scale:g}",
        case.nfe,
        f"{best.label}, {best.grid.label}",
        f"{means.max():.2f}",
        f"{means.max() - own.max():.2f}",
        *cells,
    ]


@command(__doc__)
@click.option("--storage", default="bespoke-data/benchmarks/grid_race", type=Path, help="Folder for scores.")
@quick_option
@results_option
def main(storage: Path, quick: bool, results: Path) -> None:
    torch.set_num_threads(1)
    before = load()
    storage.mkdir(parents=True, exist_ok=True)
    orders = 5 if quick else ORDERS
    inside = [within(case, orders, storage) for case in WITHIN[: 1 if quick else None]]
    outside = [across(case, orders, storage) for case in ACROSS[: 1 if quick else None]]
    sections = [
        "Among the grids of a family, by the sweep's race, against a full search; the samples of both leave out the "
        "final, in which a race scores the closest solvers on all pairs, and a full search always three:",
        table(
            ["model", "NFE", "samples", "finalists", "mean loss (dB)", "95 %", "99 %", "largest", "over 0.1 dB"], inside
        ),
        f"Over the starts of a distillation and their rivals, against the best of nine families on 59 grids each, with "
        f"at most {FEW} pairs and with 12.8 for each solver; the loss includes what these solvers lack:",
        table(
            [
                *("model", "guidance", "NFE", "best of the full search", "dB", "listed behind (dB)"),
                *("evaluations", "mean loss (dB)", "largest", "evaluations", "mean loss (dB)", "largest"),
            ],
            outside,
        ),
    ]
    publish(results, "grid-race", "Races among solvers", sections, quick=quick, load_before=before)


if __name__ == "__main__":
    main()
