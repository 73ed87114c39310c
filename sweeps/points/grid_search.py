"""Chooses the best of many candidate grids of one family, on validation pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.hosts.distillation import mean_psnr
from orchestrator.pairs.spec import split_name
from orchestrator.pool.requests import Pool
from sweeps.race import PAIRS_EACH, Candidate, psnr_scores, race

FINALISTS = 3
"""Grids that are scored again on all validation pairs; after a race at most so many."""

CLOSE = 2.0
"""Standard errors from the winner of a race within which a grid is a finalist."""

LEAST_SAMPLES = 256
"""Samples that a race may draw even among few grids."""


class Choice(NamedTuple):
    """The outcome of a search.

    Attributes:
        winner: The best solver.
        psnr_db: Its mean PSNR on all validation pairs, dB; -inf if none is finite.
        evaluations: Velocity evaluations of the search.
    """

    winner: Candidate
    psnr_db: float
    evaluations: int


def full_search(candidates: Sequence[Candidate], validation: str, pairs: int, pool: Pool) -> Choice:
    """Score every solver on the first ``pairs`` validation pairs, and the best three on all of them."""
    finalists = list(range(len(candidates)))
    spent = 0
    if len(candidates) > FINALISTS:
        means = psnr_scores(candidates, validation, range(pairs), pool).mean(axis=1)
        finalists = sorted(finalists, key=lambda i: -_finite(means[i]))[:FINALISTS]
        spent += pairs * sum(candidate.solver.nfe for candidate in candidates)
    return _final([candidates[i] for i in finalists], validation, spent, pool)


def raced_search(candidates: Sequence[Candidate], validation: str, pairs: int, pool: Pool) -> Choice:
    """Race the solvers on the first ``pairs`` validation pairs, and score the closest three on all of them."""
    if len(candidates) <= FINALISTS:
        return _final(candidates, validation, 0, pool)
    nfe = sum(candidate.solver.nfe for candidate in candidates)
    most = max(int(PAIRS_EACH * nfe), LEAST_SAMPLES * nfe // len(candidates))
    ranking = race(candidates, validation, pool=pool, last_pairs=pairs, keep=FINALISTS, most_evaluations=most)
    if not ranking.finalists:
        return Choice(candidates[0], -math.inf, ranking.evaluations)
    return _final(ranking.close(0.0, standard_errors=CLOSE), validation, ranking.evaluations, pool)


def _final(finalists: Sequence[Candidate], validation: str, spent: int, pool: Pool) -> Choice:
    """The best of these solvers on all validation pairs; of equal ones, the last."""
    means = [_finite(mean_psnr(candidate.solver, validation, pool.gather)) for candidate in finalists]
    psnr, place = max(zip(means, range(len(means)), strict=True))
    spent += split_name(validation)[1] * sum(candidate.solver.nfe for candidate in finalists)
    return Choice(finalists[place], psnr, spent)


def _finite(psnr: float) -> float:
    return psnr if math.isfinite(psnr) else -math.inf
