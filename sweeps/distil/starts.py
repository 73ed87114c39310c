"""Starts of a distillation, and the baseline it is compared with: which fixed solvers race, and which of them win.

The best fixed solver is not always the best start. From solvers with several evaluations per step, and from AB4 at many
evaluations, Levenberg-Marquardt arrives at a lower PSNR than from others that are far behind them
(``benchmarks/bench_starts.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from orchestrator import plugins
from orchestrator.pool.requests import Pool
from solvers.grids import Grid
from solvers.schedulers.base import Scheduler
from sweeps.point import SolverChoice
from sweeps.race import PAIRS_EACH, Candidate, race


class Listed(NamedTuple):
    """A family of the shortlist, and the exponents (p, q) of the warped grids that it is tried on."""

    family: str
    options: dict[str, Any]
    warps: tuple[tuple[float, float], ...]


AB4 = Listed(
    "adams_bashforth",
    {"steps_back": 4},
    ((1.8, 1.4), (2.0, 1.4), (1.8, 1.8), (1.8, 1.2), (2.2, 1.8), (1.4, 1.8), (2.2, 1.4), (1.4, 1.2)),
)

STARTS = (
    Listed(
        "adams_bashforth", {"steps_back": 3}, ((1.8, 1.4), (2.0, 1.2), (2.0, 1.4), (1.6, 1.2), (2.2, 1.2), (1.8, 1.6))
    ),
    Listed("adams_bashforth", {"steps_back": 2}, ((1.6, 1.2), (1.8, 1.4), (1.6, 1.0), (1.6, 1.4), (1.4, 1.0))),
    Listed("dpmpp_2m", {}, ((1.8, 1.8),)),
)
"""Good starts. Together with AB4 and :data:`RIVALS` their best is within 0.3 dB of the best of nine families on 59
grids each (``benchmarks/bench_grid_race.py``)."""

RIVALS = (Listed("midpoint", {}, ((1.6, 1.2),)), Listed("rk4", {}, ((2.0, 1.8),)))
"""Fixed solvers that may be the best ones, but are poor starts."""

AB4_BELOW = 12
"""NFE from which on AB4 is a rival and not a start: at 16 it arrives 2 dB below AB3, which begins 2 dB below it."""

FINALISTS, CLOSE_DB = 3, 1.0
"""Most starts of a distillation, and how far they may be behind the winner of the race, dB."""

RIVALS_SHARE, RIVALS_PAIRS = 1 / 3, 6
"""Most share of a race's evaluations that is spent on the rivals, and most pairs for each of them."""


class Starts(NamedTuple):
    """The outcome of the races.

    Attributes:
        starts: Solvers to start from, best first; none if no solver gives finite samples.
        baseline: The best fixed solver, rivals included; None if there is none.
        evaluations: Velocity evaluations spent.
    """

    starts: list[Candidate]
    baseline: Candidate | None
    evaluations: int


def shortlist(nfe: int, scheduler: Scheduler) -> list[Candidate]:
    """Fixed solvers worth starting from, a dozen or two.

    Args:
        nfe: Velocity evaluations. Of solvers that coincide at so few, all but the first are left out.
        scheduler: Scheduler of the model's field. Solvers that cannot step along its path are left out.
    """
    return _candidates((*STARTS, AB4) if nfe < AB4_BELOW else STARTS, nfe, scheduler)


def rivals(nfe: int, scheduler: Scheduler) -> list[Candidate]:
    """Fixed solvers that may be better than the shortlist, but are worse starts. Families that cannot make ``nfe``
    evaluations are left out.
    """
    return _candidates(RIVALS if nfe < AB4_BELOW else (AB4, *RIVALS), nfe, scheduler)


def choose_starts(
    nfe: int, scheduler: Scheduler, pairs: str, *, pool: Pool, last_pairs: int, most_evaluations: int | None
) -> Starts:
    """Race the shortlist, and then its winner against the rivals, as far as the evaluations suffice for them.

    Args:
        nfe, scheduler: As for :func:`shortlist`.
        pairs: Name of a pair set.
        pool: Hosts of the model.
        last_pairs: Pairs that the finalists are compared on at most.
        most_evaluations: Limit of both races; None: no other limit than their own.

    Raises:
        ValueError: ``most_evaluations`` does not suffice for a single pair of the shortlist.
    """
    listed, others = shortlist(nfe, scheduler), rivals(nfe, scheduler)
    cost = nfe * (1 + len(others))
    reserved = int(PAIRS_EACH * cost)
    if most_evaluations is not None:
        reserved = min(int(RIVALS_SHARE * most_evaluations), RIVALS_PAIRS * cost)
    if not others or (most_evaluations is not None and most_evaluations - reserved < nfe * len(listed)):
        reserved = 0
    most = None if most_evaluations is None else most_evaluations - reserved
    ranking = race(listed, pairs, pool=pool, last_pairs=last_pairs, keep=FINALISTS, most_evaluations=most)
    starts = ranking.close(CLOSE_DB)
    if reserved < cost:
        return Starts(starts, starts[0] if starts else None, ranking.evaluations)
    second = race([*starts[:1], *others], pairs, pool=pool, last_pairs=last_pairs, most_evaluations=reserved)
    baseline = second.finalists[0].candidate if second.finalists else None
    return Starts(starts, baseline, ranking.evaluations + second.evaluations)


def _candidates(families: tuple[Listed, ...], nfe: int, scheduler: Scheduler) -> list[Candidate]:
    candidates: dict[tuple[float, ...], Candidate] = {}
    for listed in families:
        label = plugins.build("families", listed.family, listed.options).label
        for p, q in listed.warps:
            choice = SolverChoice(family=listed.family, options=listed.options, label=label, grid=Grid("warped", p, q))
            try:
                solver = choice.solver(nfe, 1.0).to_ns(scheduler)
            except ValueError:  # not a multiple of its evaluations per step, or an infinite velocity
                continue
            candidates.setdefault(tuple(solver.flat().tolist()), Candidate(choice=choice, solver=solver))
    return list(candidates.values())
