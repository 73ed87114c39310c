"""A race among time grids against a full search: samples drawn, and the PSNR lost by its choice.

Every grid of the default search is scored once on 256 pairs, for nine families. Races on random orders of these pairs
then choose a grid; the loss is the difference from the best grid's mean over all 256 pairs.

python benchmarks/bench_grid_race.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator import plugins
from orchestrator.config.solvers import GridSearch
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.pool.requests import LocalPool
from orchestrator.randomness import noise
from solvers.families import Family, GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.losses import per_sample_mse, psnr_db
from solvers.ns import NSSolver
from sweeps.points.grid_search import full_search, race

CASES = (("digits_fm_ot", 4), ("digits_fm_ot", 8), ("digits_eps_vp", 8), ("digits_fm_v_cs", 8))
"""Model and NFE."""

PAIRS = 256
VALIDATION = f"validation-{PAIRS}"
NAMES = ("euler", "midpoint", "heun", "rk4", "ddim", "dpmpp_2m")
ORDERS = 40
"""Random orders of the pairs for each family."""


def families() -> list[Family]:
    return [*(plugins.build("families", name) for name in NAMES), *(AdamsBashforth(back) for back in (2, 3, 4))]


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


def scores_of(weights: str, nfe: int, pairs: int) -> list[tuple[list[NSSolver], npt.NDArray[np.float64]]]:
    """For each family, its solvers on all grids, and their PSNR on each pair."""
    model = ZooModel(weights)
    field = model.field(torch.arange(pairs) % 10, 1.0)
    x0 = torch.from_numpy(noise(5, range(pairs), model.shape))
    x1 = solve(field, x0, 1e-5, 1e-5).x1.float()
    scored = []
    for family in families():
        solvers = []
        for grid in GridSearch().candidates():
            try:
                solvers.append(GridSolver(family, nfe, grid).to_ns(model.scheduler))
            except ValueError:  # steps indistinguishably close
                continue
        with torch.no_grad():
            rows = [psnr_db(per_sample_mse(solver.sample(field, x0), x1), 2.0).numpy() for solver in solvers]
        scored.append((solvers, np.array(rows)))
    return scored


def measure(weights: str, nfe: int, orders: int, pairs: int) -> tuple[list[float], list[float]]:
    """PSNR lost, and samples drawn relative to the full search, of every race. Both leave out the last validation."""
    losses, shares = [], []
    for solvers, scores in scores_of(weights, nfe, pairs):
        means = scores.mean(axis=1)
        full = full_search(solvers, VALIDATION, pairs, LocalPool(KnownScores(solvers, scores))).samples - 3 * PAIRS
        for seed in range(orders):
            order = np.random.default_rng(seed).permutation(pairs)
            pool = LocalPool(KnownScores(solvers, scores[:, order]))
            choice = race(solvers, VALIDATION, GridSearch(search="race").last_pairs, pool)
            losses.append(float(means.max() - means[choice.winner]))
            shares.append((choice.samples - PAIRS) / full)
    return losses, shares


@command(__doc__)
@quick_option
@results_option
def main(quick: bool, results: Path) -> None:
    torch.set_num_threads(1)
    before = load()
    rows = []
    for weights, nfe in CASES[:1] if quick else CASES:
        losses, shares = measure(weights, nfe, 5 if quick else ORDERS, PAIRS)
        p95, largest = np.quantile(losses, 0.95), max(losses)
        rows.append(
            [weights, nfe, f"1/{1 / np.mean(shares):.0f}", f"{np.mean(losses):.3f}", f"{p95:.3f}", f"{largest:.2f}"]
        )
    heading = ["model", "NFE", "samples", "mean loss (dB)", "95 % below (dB)", "largest (dB)"]
    publish(results, "grid-race", "Race among grids", [table(heading, rows)], quick=quick, load_before=before)


if __name__ == "__main__":
    main()
