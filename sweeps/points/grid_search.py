"""Chooses the best of many candidate grids of one family, on validation pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.hosts.distillation import mean_psnr, to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.metrics.base import EXACT_DB
from orchestrator.pairs.spec import split_name
from orchestrator.pool.requests import Pool, Request
from solvers.ns import NSSolver

FINALISTS = 3
"""Grids that a full search scores again on all validation pairs."""

FIRST_PAIRS = 4
"""Pairs of a race's first round. Each further round has twice as many pairs and half the grids, at least two."""


class Choice(NamedTuple):
    """The outcome of a search.

    Attributes:
        winner: Index of the best solver.
        psnr_db: Its mean PSNR on all validation pairs, dB; -inf if none is finite.
        samples: Samples drawn by the search.
    """

    winner: int
    psnr_db: float
    samples: int


def full_search(solvers: Sequence[NSSolver], validation: str, pairs: int, pool: Pool) -> Choice:
    """Score every solver on the first ``pairs`` validation pairs, and the best three on all of them."""
    finalists = list(range(len(solvers)))
    samples = 0
    if len(solvers) > FINALISTS:
        means = _means(_scores(solvers, validation, range(pairs), pool))
        finalists = sorted(finalists, key=lambda i: -means[i])[:FINALISTS]
        samples += len(solvers) * pairs
    full = [_finite(mean_psnr(solvers[i], validation, pool.gather)) for i in finalists]
    samples += len(full) * split_name(validation)[1]
    psnr, winner = max(zip(full, finalists, strict=True))
    return Choice(winner, psnr, samples)


def race(solvers: Sequence[NSSolver], validation: str, pairs: int, pool: Pool) -> Choice:
    """Successive halving (Jamieson & Talwalkar 2016): the worse half of the solvers drops out, the others go on.

    All solvers are scored on the same pairs, so a difference between two of them shows on few pairs already.

    Args:
        solvers: The candidates.
        validation: Name of the validation pairs.
        pairs: Validation pairs of the last round; the winner is scored on all.
        pool: Hosts of the model.
    """
    running = list(range(len(solvers)))
    scores: npt.NDArray[np.float64] = np.zeros((len(solvers), 0))
    samples = 0
    seen = 0
    while len(running) > 1 and seen < pairs:
        following = min(pairs, max(FIRST_PAIRS, 2 * seen))
        new = _scores([solvers[i] for i in running], validation, range(seen, following), pool)
        scores, seen = np.concatenate([scores, new], axis=1), following
        samples += new.size
        last = seen == pairs
        kept = np.argsort(-_means(scores), kind="stable")[: 1 if last else max(2, math.ceil(len(running) / 2))]
        running, scores = [running[i] for i in kept], scores[kept]
    (winner, *_) = running
    psnr = _finite(mean_psnr(solvers[winner], validation, pool.gather))
    return Choice(winner, psnr, samples + split_name(validation)[1])


def _scores(solvers: Sequence[NSSolver], validation: str, indices: range, pool: Pool) -> npt.NDArray[np.float64]:
    """PSNR of each solver on each of these pairs, (S, P)."""
    thetas = [to_numpy(solver.flat()) for solver in solvers]
    request = Request.of(
        HostProtocol.score_thetas, thetas=thetas, pairs=validation, metric="psnr", indices=list(indices)
    )
    scores: list[npt.NDArray[np.float64]] = pool.call(request)
    return np.minimum(np.stack(scores), EXACT_DB)  # an exact sample has infinite PSNR


def _means(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean score of each solver, (S,); -inf if it is not finite, so that it loses every comparison."""
    means = scores.mean(axis=1)
    return np.where(np.isfinite(means), means, -np.inf)


def _finite(psnr: float) -> float:
    return psnr if math.isfinite(psnr) else -math.inf
