"""A race finds what an exhaustive comparison finds, within its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from orchestrator.pool.requests import LocalPool
from solvers.grids import Grid
from solvers.ns import NSSolver
from sweeps.point import SolverChoice
from sweeps.race import Candidate, Ranking, race

PAIRS = "v2-abc-256"
"""Name of 256 pairs."""

NFE = 3


class Scores:
    """A host that knows the PSNR of every solver on every pair; a solver is known by its first time.

    Attributes:
        table: PSNR, (solvers, pairs), dB.
        asked: Number of solvers, and pairs, of every request.
    """

    def __init__(self, table: npt.NDArray[np.float64]):
        self.table = table
        self.asked: list[tuple[int, list[int]]] = []

    def score_thetas(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        assert (pairs, metric) == (PAIRS, "psnr")
        self.asked.append((len(thetas), list(indices)))
        return [self.table[round(1000 * theta[0]), list(indices)] for theta in thetas]

    @property
    def evaluations(self) -> int:
        return sum(NFE * count * len(indices) for count, indices in self.asked)


def candidates(count: int) -> list[Candidate]:
    """Candidates of three evaluations, which differ in their first time."""
    return [
        Candidate(
            choice=SolverChoice(family="euler", options={}, label=str(number), grid=Grid()),
            solver=NSSolver(
                torch.tensor([number / 1000, 0.5, 0.9], dtype=torch.float64),
                torch.ones(NFE + 1, dtype=torch.float64),
                torch.ones(NFE + 1, NFE, dtype=torch.float64).tril(-1),
            ),
        )
        for number in range(count)
    ]


def table(count: int, seed: int = 0, noise: float = 0.3) -> npt.NDArray[np.float64]:
    """Solvers that differ by 0.2 dB on pairs that differ by 6 dB, each with ``noise`` dB of its own on each pair."""
    generator = np.random.default_rng(seed)
    quality = generator.permutation(count) * 0.2
    return quality[:, None] + 6 * generator.normal(size=256) + noise * generator.normal(size=(count, 256))


def raced(host: Scores, **settings: Any) -> Ranking:
    return race(candidates(len(host.table)), PAIRS, pool=LocalPool(host), **settings)


def places(ranking: Ranking) -> list[int]:
    """Numbers of the finalists, best first."""
    return [int(finalist.candidate.choice.label) for finalist in ranking.finalists]


@pytest.mark.parametrize("seed", range(5))
def test_a_race_ranks_as_an_exhaustive_comparison_does(seed: int) -> None:
    """Pairs differ far more than solvers do, but all solvers see the same ones."""
    scores = table(59, seed, noise=0.01)
    ranking = raced(Scores(scores), keep=5)
    assert places(ranking) == np.argsort(-scores.mean(axis=1))[:5].tolist()
    seen = scores[places(ranking), : ranking.pairs]
    behind = seen[:1] - seen
    errors = behind.std(axis=1, ddof=1) / ranking.pairs**0.5
    assert [f.behind_db for f in ranking.finalists] == pytest.approx(behind.mean(axis=1))
    assert [f.error_db for f in ranking.finalists] == pytest.approx(errors)
    assert [f.psnr_db for f in ranking.finalists] == pytest.approx(seen.mean(axis=1))


def test_no_pair_is_scored_twice_for_one_solver() -> None:
    """The rounds follow each other on one set of pairs, and the finalists are compared on all pairs so far."""
    host = Scores(table(16))
    ranking = raced(host, keep=2, last_pairs=40)
    counts = [count for count, _ in host.asked]
    assert (counts[0], counts[-1]) == (16, 2)
    assert counts == sorted(counts, reverse=True)
    assert [index for _, indices in host.asked for index in indices] == list(range(ranking.pairs))
    assert ranking.pairs <= 40
    assert ranking.evaluations == host.evaluations <= 12.8 * 16 * NFE


@pytest.mark.parametrize("most", [59 * NFE, 59 * NFE + 1, 500, 1000, 2000, 5000])
@pytest.mark.parametrize("keep", [1, 4])
def test_a_race_keeps_to_its_evaluations(most: int, keep: int) -> None:
    """Scarce evaluations are spent on fewer pairs; enough of them are mostly used."""
    host = Scores(table(59))
    ranking = raced(host, keep=keep, most_evaluations=most)
    assert ranking.evaluations == host.evaluations <= most
    assert len(ranking.finalists) == keep
    if most > 500:
        assert places(ranking)[0] in np.argsort(-host.table.mean(axis=1))[:6]


def test_too_few_evaluations_are_refused_before_any_is_spent() -> None:
    """Every candidate needs a pair."""
    host = Scores(table(59))
    with pytest.raises(ValueError, match="a race of 59 solvers takes at least 177 evaluations, but may spend 176"):
        raced(host, most_evaluations=176)
    assert host.asked == []


def test_after_a_single_pair_nothing_is_known_about_the_order() -> None:
    """The standard error of a difference is then infinite."""
    ranking = raced(Scores(table(59)), keep=4, most_evaluations=59 * NFE)
    assert ranking.pairs == 1
    assert [f.error_db for f in ranking.finalists] == [0, np.inf, np.inf, np.inf]
    assert len(ranking.close(within_db=0.0)) == 4


def test_equal_solvers_stay_in_their_order() -> None:
    """Euler and DDIM are one solver on some paths."""
    ranking = raced(Scores(np.repeat(table(1), 8, axis=0)), keep=3)
    assert places(ranking) == [0, 1, 2]
    assert [(f.behind_db, f.error_db) for f in ranking.finalists] == [(0, 0)] * 3


def test_candidates_whose_samples_are_not_finite_drop_out() -> None:
    """Even if fewer finalists are left than asked for, or none."""
    scores = table(5)
    scores[[0, 1, 3], 2] = [np.nan, -np.inf, np.nan]
    assert sorted(places(raced(Scores(scores), keep=4))) == [2, 4]
    assert raced(Scores(np.full((5, 256), np.nan)), keep=2).finalists == ()


def test_an_exact_sample_does_not_disqualify() -> None:
    """Its PSNR is infinite."""
    scores = table(8)
    scores[3, 0] = np.inf
    assert places(raced(Scores(scores))) == [3]


def test_one_candidate_and_more_finalists_than_candidates() -> None:
    """One candidate is looked at in the first round only; with several finalists all are ranked."""
    host = Scores(table(1))
    assert places(raced(host)) == [0]
    assert host.asked == [(1, [0, 1, 2, 3, 4, 5])]
    assert len(raced(Scores(table(3)), keep=10).finalists) == 3


def test_close_finalists() -> None:
    """Those within the distance or a standard error of the winner are close."""
    scores = np.zeros((4, 256))
    scores[:, ::2] = [[10.0], [9.5], [14.0], [1.0]]
    scores[:, 1::2] = [[10.0], [9.5], [5.9], [1.0]]  # the third one is 0.05 dB behind, and noisy
    ranking = raced(Scores(scores), keep=4, last_pairs=6)
    assert places(ranking) == [0, 2, 1, 3]
    assert [c.choice.label for c in ranking.close(within_db=0.6)] == ["0", "2", "1"]
    assert [c.choice.label for c in ranking.close(within_db=0.0)] == ["0", "2"]
