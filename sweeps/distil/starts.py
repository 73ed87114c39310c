"""Starts of a distillation: the fixed solvers that lead the full grid search on some model, a few for each family."""

from __future__ import annotations

from typing import Any, NamedTuple

from orchestrator import plugins
from solvers.grids import Grid
from solvers.schedulers.base import Scheduler
from sweeps.point import SolverChoice
from sweeps.race import Candidate


class Listed(NamedTuple):
    """A family of the shortlist, and the exponents (p, q) of the warped grids that it is tried on."""

    family: str
    options: dict[str, Any]
    warps: tuple[tuple[float, float], ...]


SHORTLIST = (
    Listed(
        "adams_bashforth", {"steps_back": 3}, ((1.8, 1.4), (2.0, 1.2), (2.0, 1.4), (1.6, 1.2), (2.2, 1.2), (1.8, 1.6))
    ),
    Listed(
        "adams_bashforth",
        {"steps_back": 4},
        ((1.8, 1.4), (2.0, 1.4), (1.8, 1.8), (1.8, 1.2), (2.2, 1.8), (1.4, 1.8), (2.2, 1.4), (1.4, 1.2)),
    ),
    Listed("adams_bashforth", {"steps_back": 2}, ((1.6, 1.2), (1.8, 1.4), (1.6, 1.0), (1.6, 1.4))),
    Listed("midpoint", {}, ((1.6, 1.2),)),
    Listed("dpmpp_2m", {}, ((1.8, 1.8),)),
)
"""The best of these is within 0.2 dB of the best of nine families on 59 grids each, on every model of images of the zoo
(``benchmarks/bench_grid_race.py``): chosen one after the other, each to lower the loss of the shortlist."""


def shortlist(nfe: int, scheduler: Scheduler) -> list[Candidate]:
    """Fixed solvers worth starting from: about twenty, the best of which is close to the best of a full grid search.

    Args:
        nfe: Velocity evaluations. Families that cannot make so many are left out, and of solvers that coincide at so
            few, all but the first.
        scheduler: Scheduler of the model's field. Solvers that cannot step along its path are left out.
    """
    candidates: dict[tuple[float, ...], Candidate] = {}
    for listed in SHORTLIST:
        label = plugins.build("families", listed.family, listed.options).label
        for p, q in listed.warps:
            choice = SolverChoice(family=listed.family, options=listed.options, label=label, grid=Grid("warped", p, q))
            try:
                solver = choice.solver(nfe, 1.0).to_ns(scheduler)
            except ValueError:  # not a multiple of its evaluations per step, or an infinite velocity
                continue
            candidates.setdefault(tuple(solver.flat().tolist()), Candidate(choice=choice, solver=solver))
    return list(candidates.values())
