"""A race among grids finds what a full search finds, for a fraction of the samples."""

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
from sweeps.points.grid_search import Choice, full_search, raced_search
from sweeps.race import Candidate

VALIDATION = "v2-abc-1024"
"""Name of 1024 pairs."""


class Scores:
    """A host that knows the PSNR of every solver on every pair; a solver is known by its only time.

    Attributes:
        table: PSNR, (solvers, pairs), dB.
        samples: Number of samples drawn.
    """

    def __init__(self, table: npt.NDArray[np.float64]):
        self.table = table
        self.samples = 0

    def row(self, theta: npt.NDArray[np.float64], indices: Sequence[int]) -> npt.NDArray[np.float64]:
        self.samples += len(indices)
        scores: npt.NDArray[np.float64] = self.table[round(100 * theta[0]), list(indices)]
        return scores

    def score_thetas(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        return [self.row(theta, indices) for theta in thetas]

    def score(
        self, theta: npt.NDArray[np.float64], pairs: str, metrics: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float64]]:
        return {"psnr": self.row(theta, range(1024))}


def candidates(count: int) -> list[Candidate]:
    """Solvers of one evaluation, which differ in its time."""
    flat = [torch.tensor(values, dtype=torch.float64) for values in ([1.0, 1.0], [[0.0], [1.0]])]
    return [
        Candidate(
            choice=SolverChoice(family="euler", options={}, label=str(number), grid=Grid()),
            solver=NSSolver(torch.tensor([number / 100], dtype=torch.float64), *flat),
        )
        for number in range(count)
    ]


def table(count: int, seed: int) -> npt.NDArray[np.float64]:
    """Solvers that differ by 0.2 dB on pairs that differ by 6 dB, with 0.3 dB of their own."""
    generator = np.random.default_rng(seed)
    quality = generator.permutation(count) * 0.2
    return quality[:, None] + 6 * generator.normal(size=1024) + 0.3 * generator.normal(size=(count, 1024))


def searched(search: Any, host: Scores) -> Choice:
    choice: Choice = search(candidates(len(host.table)), VALIDATION, 256, LocalPool(host))
    assert choice.evaluations == host.samples
    return choice


@pytest.mark.parametrize("seed", range(5))
def test_a_race_finds_the_grid_of_the_full_search(seed: int) -> None:
    """For a twentieth of the samples, before both score the end on all pairs."""
    host, other = Scores(table(59, seed)), Scores(table(59, seed))
    raced, full = searched(raced_search, host), searched(full_search, other)
    assert raced.winner.choice.label == full.winner.choice.label == str(other.table.mean(axis=1).argmax())
    assert raced.psnr_db == full.psnr_db
    assert raced.evaluations - 3 * 1024 <= (full.evaluations - 3 * 1024) / 20


def test_a_race_among_few_grids_draws_enough_samples() -> None:
    """A twentieth of a search among five grids would be 13 pairs each."""
    scores = table(5, 0)
    scores[:3] = scores[0]  # three equal ones, all of which are finalists
    choice = searched(raced_search, Scores(scores))
    assert 5 * 12.8 < choice.evaluations % 1024 <= 256


@pytest.mark.parametrize("search", [raced_search, full_search])
def test_grids_whose_samples_are_not_finite_lose(search: Any) -> None:
    """Unless all of them do: then the search says so by a PSNR of -inf."""
    scores = table(5, 1)
    best = int(scores.mean(axis=1).argmax())
    scores[best, 2] = np.nan
    others = [i for i in range(5) if i != best]
    assert searched(search, Scores(scores)).winner.choice.label == str(max(others, key=lambda i: scores[i].mean()))
    assert searched(search, Scores(np.full((5, 1024), np.nan))).psnr_db == -np.inf


@pytest.mark.parametrize("search", [raced_search, full_search])
def test_an_exact_sample_does_not_disqualify_its_grid(search: Any) -> None:
    """Its PSNR is infinite."""
    scores = table(8, 2)
    scores[3, :32] = np.inf
    assert searched(search, Scores(scores)).winner.choice.label == "3"


@pytest.mark.parametrize("search", [raced_search, full_search])
def test_a_single_grid_is_validated_only(search: Any) -> None:
    """There is nothing to choose."""
    host = Scores(table(1, 0))
    choice = searched(search, host)
    assert choice.evaluations == 1024
    assert choice.psnr_db == pytest.approx(host.table.mean())
