"""A race among solvers: all are compared on a few pairs, the losers drop out, and the others go on to more pairs.

Successive halving (Jamieson & Talwalkar 2016) on paired differences: all solvers see the same pairs, so a difference
between two of them shows on few pairs, although pairs differ far more than solvers do.
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

FIRST_PAIRS = 4
"""Pairs of the first round. Each further round doubles the pairs seen so far."""

Scores = npt.NDArray[np.float64]
"""PSNR of each running candidate on each pair seen so far, (candidates, pairs), dB."""


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

    def close(self, within_db: float) -> list[Candidate]:
        """The winner, and the finalists behind it by at most ``within_db`` or one standard error; best first."""
        return [f.candidate for f in self.finalists if f.behind_db <= max(within_db, f.error_db)]


def race(
    candidates: Sequence[Candidate],
    pairs: str,
    *,
    pool: Pool,
    first_pairs: int = FIRST_PAIRS,
    last_pairs: int = 64,
    keep: int = 1,
    most_evaluations: int | None = None,
) -> Ranking:
    """Compare the candidates on ever more pairs. After each round the worse half drops out.

    Candidates whose samples are not finite drop out too. The race ends after ``last_pairs``, when one candidate is
    left, or when the evaluations are used up. If they are scarce, it begins with fewer pairs, one at least.

    Args:
        candidates: At least one. Of equal candidates, the first ones stay.
        pairs: Name of a pair set.
        pool: Hosts of the model.
        first_pairs: Pairs of the first round.
        last_pairs: Pairs that the finalists are compared on, the first ones of the set.
        keep: Number of finalists.
        most_evaluations: Limit of velocity evaluations; None: no limit.

    Raises:
        ValueError: ``most_evaluations`` does not suffice for a single pair.
    """
    running, scores, spent = list(candidates), np.zeros((len(candidates), 0)), 0
    most = math.inf if most_evaluations is None else most_evaluations
    if most < _cost(running):
        raise ValueError(
            f"a race of {len(running)} solvers takes at least {_cost(running)} evaluations, but may spend {most:g}; "
            f"raise the limit, or race fewer solvers"
        )
    stop = _first_stop(len(running), keep, first_pairs, last_pairs, most / _cost(running))
    while scores.shape[1] < stop:
        seen = scores.shape[1]
        scores = np.concatenate([scores, _scores(running, pairs, range(seen, stop), pool)], axis=1)
        spent += (stop - seen) * _cost(running)
        kept = _best(scores, max(keep, math.ceil(len(running) / 2)))
        running, scores = [running[i] for i in kept], scores[kept]
        if not running or len(running) == 1 == keep:
            break
        stop = min(last_pairs, 2 * stop, stop + _floor((most - spent) / _cost(running)))
    kept = _best(scores, keep)
    return _ranking([running[i] for i in kept], scores[kept], spent)


def _cost(running: Sequence[Candidate]) -> int:
    """Evaluations that these candidates take for one pair."""
    return sum(candidate.solver.nfe for candidate in running)


def _floor(value: float) -> float:
    return value if math.isinf(value) else math.floor(value)


def _first_stop(count: int, keep: int, first_pairs: int, last_pairs: int, most: float) -> int:
    """Pairs of the first round: fewer than ``first_pairs`` if all rounds would take more than ``most`` pairs of all."""
    for first in range(min(first_pairs, last_pairs), 1, -1):
        cost, running, seen, stop = 0.0, count, 0, first
        while seen < stop:
            cost += (stop - seen) * running / count
            running, seen, stop = max(keep, math.ceil(running / 2)), stop, min(last_pairs, 2 * stop)
            if running == 1 == keep:
                break
        if cost <= most:
            return first
    return 1


def _scores(running: Sequence[Candidate], pairs: str, indices: range, pool: Pool) -> Scores:
    """PSNR of each candidate on each of these pairs, dB."""
    thetas = [to_numpy(candidate.solver.flat()) for candidate in running]
    request = Request.of(HostProtocol.score_thetas, thetas=thetas, pairs=pairs, metric="psnr", indices=list(indices))
    return np.minimum(np.stack(pool.call(request)), EXACT_DB)  # an exact sample has infinite PSNR


def _best(scores: Scores, most: int) -> list[int]:
    """Rows of the best candidates, best first, at most ``most``; none whose samples are not finite."""
    means = scores.mean(axis=1)
    order = np.argsort(-means, kind="stable")
    return [int(i) for i in order if math.isfinite(means[i])][:most]


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
