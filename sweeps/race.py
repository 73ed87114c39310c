"""A race among solvers: all are compared on a few pairs, the losers drop out, and the others go on to more pairs.

A form of successive halving (Jamieson & Talwalkar 2016) on paired differences: all solvers see the same pairs, so a
difference between two of them shows on few pairs, although pairs differ far more than solvers do. The constants are
those of ``benchmarks/bench_grid_race.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.metrics.base import EXACT_DB
from orchestrator.pool.requests import Pool, Request
from solvers.ns import NSSolver
from sweeps.point import SolverChoice

FIRST_PAIRS = 6
"""Pairs of the first round, unless these take more than half of the evaluations."""

GROWTH = 1.4
"""Factor from the pairs of one round to those of the next."""

CLEARLY = 3.0
"""A candidate drops out if it is this many standard errors behind the leader."""

ROUND_SHARE = 0.35
"""Share of the evaluations left that the next round may take. As many of the worst candidates drop out as it needs."""

PAIRS_EACH = 12.8
"""Default limit of a race: pairs for each candidate, a twentieth of a comparison of all on 256 pairs."""

Scores = npt.NDArray[np.float64]
"""PSNR of each candidate on each pair, (candidates, pairs), dB."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A solver that takes part in a race.

    Attributes:
        choice: Its family, options and grid.
        solver: The solver itself.
    """

    choice: SolverChoice
    solver: NSSolver


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A candidate that was not eliminated.

    Attributes:
        candidate: The candidate.
        psnr_db: Its mean PSNR on the pairs of the race.
        behind_db: How far this is below the winner's.
        error_db: Standard error of ``behind_db``; 0 for the winner, infinite after a single pair.
    """

    candidate: Candidate
    psnr_db: float
    behind_db: float
    error_db: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The outcome of a race.

    Attributes:
        finalists: Best first; none if no candidate gives finite samples.
        pairs: Number of pairs on which the finalists were compared.
        evaluations: Velocity evaluations spent.
    """

    finalists: tuple[Finalist, ...]
    pairs: int
    evaluations: int

    def close(self, within_db: float, standard_errors: float = 1.0) -> list[Candidate]:
        """The winner, and the finalists behind it by at most ``within_db`` or so many standard errors; best first."""
        return [f.candidate for f in self.finalists if f.behind_db <= max(within_db, standard_errors * f.error_db)]


def race(
    candidates: Sequence[Candidate],
    pairs: str,
    *,
    pool: Pool,
    first_pairs: int = FIRST_PAIRS,
    last_pairs: int = 256,
    keep: int = 1,
    most_evaluations: int | None = None,
) -> Ranking:
    """Compare the candidates on ever more pairs. After each round those that are clearly behind drop out.

    Further ones drop out if the evaluations do not suffice for all, and those whose samples are not finite. The race
    ends after ``last_pairs``, when a single candidate is left, or when the evaluations are used up.

    Args:
        candidates: At least one. Of equal candidates, the first ones stay.
        pairs: Name of a pair set.
        pool: Hosts of the model.
        first_pairs: Pairs of the first round.
        last_pairs: Pairs that the finalists are compared on at most, the first ones of the set.
        keep: Number of finalists.
        most_evaluations: Limit of velocity evaluations; None: :data:`PAIRS_EACH` samples of each candidate.

    Raises:
        ValueError: ``most_evaluations`` does not suffice for a single pair.
    """
    running = list(candidates)
    left = int(PAIRS_EACH * _cost(running)) if most_evaluations is None else most_evaluations
    if left < _cost(running):
        raise ValueError(
            f"a race of {len(running)} solvers takes at least {_cost(running)} evaluations, but may spend {left}; "
            f"raise the limit, or race fewer solvers"
        )
    stop = min(first_pairs, last_pairs, max(1, left // 2 // _cost(running)))
    scores: Scores = np.zeros((len(running), 0))
    spent = 0
    while (seen := scores.shape[1]) < stop:
        scores = np.concatenate([scores, psnr_scores(running, pairs, range(seen, stop), pool)], axis=1)
        spent, left = spent + (stop - seen) * _cost(running), left - (stop - seen) * _cost(running)
        kept = _survivors(scores, keep)
        running, scores = [running[i] for i in kept], scores[kept]
        if not running or len(running) == keep == 1:
            break
        following = min(last_pairs, math.ceil(GROWTH * stop))
        while len(running) > max(keep, 2) and (following - stop) * _cost(running) > ROUND_SHARE * left:
            running.pop()
        scores = scores[: len(running)]
        stop = min(following, stop + left // _cost(running))
    return _ranking(running[:keep], scores[:keep], spent)


def _cost(running: Sequence[Candidate]) -> int:
    """Evaluations that these candidates take for one pair."""
    return sum(candidate.solver.nfe for candidate in running)


def psnr_scores(candidates: Sequence[Candidate], pairs: str, indices: range, pool: Pool) -> Scores:
    """PSNR of each candidate on each of these pairs, dB; at most :data:`EXACT_DB`, which an exact sample has."""
    thetas = [to_numpy(candidate.solver.flat()) for candidate in candidates]
    request = Request.of(HostProtocol.score_thetas, thetas=thetas, pairs=pairs, metric="psnr", indices=list(indices))
    scores: list[Scores] = pool.call(request)
    return np.minimum(np.stack(scores), EXACT_DB)


def _survivors(scores: Scores, keep: int) -> list[int]:
    """Rows of the candidates that go on, best first: at least ``keep``, unless fewer give finite samples."""
    means = scores.mean(axis=1)
    order = [int(i) for i in np.argsort(-means, kind="stable") if math.isfinite(means[i])]
    if scores.shape[1] < 3 or len(order) <= keep:  # two pairs say nothing about the error of their mean
        return order
    behind = scores[order[:1]] - scores[order]
    errors = behind.std(axis=1, ddof=1) / math.sqrt(scores.shape[1])
    # The error of few pairs may be small by chance.
    errors = np.maximum(errors, np.median(errors[1:]))
    near = behind.mean(axis=1) <= CLEARLY * errors
    return [row for place, row in enumerate(order) if place < keep or near[place]]


def _ranking(finalists: Sequence[Candidate], scores: Scores, spent: int) -> Ranking:
    """The outcome, from the finalists and their scores, best first."""
    pairs = scores.shape[1]
    behind = scores[:1] - scores
    errors = behind.std(axis=1, ddof=1) / math.sqrt(pairs) if pairs > 1 else np.where(behind[:, 0] == 0, 0, np.inf)
    rows = zip(finalists, scores.mean(axis=1), behind.mean(axis=1), errors, strict=True)
    return Ranking(
        finalists=tuple(
            Finalist(candidate=candidate, psnr_db=float(psnr), behind_db=float(difference), error_db=float(error))
            for candidate, psnr, difference, error in rows
        ),
        pairs=pairs,
        evaluations=spent,
    )
