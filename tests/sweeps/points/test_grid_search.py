"""A race among grids finds what a full search finds, for a fraction of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.pool.requests import Pool, Request
from solvers.ns import NSSolver
from sweeps.points.grid_search import full_search, race

VALIDATION = "v2-abc-256"
"""Name of 256 pairs."""


class Scores(Pool):
    """Hosts that know the PSNR of every solver on every pair; a solver is known by its only time.

    Attributes:
        table: PSNR, (solvers, pairs), dB.
        asked: Solvers and pairs of every request.
    """

    def __init__(self, table: Any):
        self.table = table
        self.asked: list[tuple[int, list[int]]] = []

    def map(self, requests: Any) -> Any:
        raise NotImplementedError

    def call(self, request: Request[Any]) -> Any:
        thetas, indices = request.arguments["thetas"], request.arguments["indices"]
        self.asked.append((len(thetas), list(indices)))
        return [self.table[round(100 * theta[0]), indices] for theta in thetas]

    def gather(self, requests: Sequence[Request[Any]]) -> Any:
        return [{"psnr": self.table[round(100 * request.arguments["theta"][0])]} for request in requests]


def solvers(count: int) -> list[NSSolver]:
    """Solvers of one evaluation, which differ in its time."""
    return [
        NSSolver(torch.tensor([number / 100]), torch.ones(2), torch.tensor([[0.0], [1.0]])) for number in range(count)
    ]


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    """Solvers are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def table(count: int, seed: int) -> Any:
    """Solvers that differ by 0.2 dB on pairs that differ by 6 dB, with 0.3 dB of their own."""
    generator = np.random.default_rng(seed)
    quality = generator.permutation(count) * 0.2
    return quality[:, None] + 6 * generator.normal(size=256) + 0.3 * generator.normal(size=(count, 256))


@pytest.mark.parametrize("seed", range(5))
def test_a_race_finds_the_grid_of_the_full_search(seed: int) -> None:
    """Pairs differ far more than grids do, but all grids see the same ones."""
    pool, other = Scores(table(59, seed)), Scores(table(59, seed))
    raced, searched = race(solvers(59), VALIDATION, 64, pool), full_search(solvers(59), VALIDATION, 256, other)
    assert raced[:2] == searched[:2]
    assert raced.samples - 256 < (searched.samples - 3 * 256) / 20


def test_the_rounds_of_a_race() -> None:
    """The worse half drops out, the pairs double, and no pair is scored twice for one grid."""
    pool = Scores(table(9, 0))
    result = race(solvers(9), VALIDATION, 20, pool)
    rounds = [(9, range(4)), (5, range(4, 8)), (3, range(8, 16)), (2, range(16, 20))]
    assert pool.asked == [(count, list(pairs)) for count, pairs in rounds]
    assert result.samples == 9 * 4 + 5 * 4 + 3 * 8 + 2 * 4 + 256


def test_grids_whose_samples_are_not_finite_lose() -> None:
    """Unless all of them do: then the search says so by a PSNR of -inf."""
    scores = table(5, 1)
    best = int(scores.mean(axis=1).argmax())
    scores[best, 2] = np.nan
    others = [i for i in range(5) if i != best]
    assert race(solvers(5), VALIDATION, 64, Scores(scores)).winner == max(others, key=lambda i: scores[i].mean())
    assert race(solvers(5), VALIDATION, 64, Scores(np.full((5, 256), np.nan))).psnr_db == -np.inf


@pytest.mark.parametrize("search", [race, full_search])
def test_an_exact_sample_does_not_disqualify_its_grid(search: Any) -> None:
    """Its PSNR is infinite."""
    scores = table(8, 2)
    scores[3, 0] = np.inf
    assert search(solvers(8), VALIDATION, 64, Scores(scores)).winner == 3


@pytest.mark.parametrize("search", [race, full_search])
def test_a_single_grid_is_validated_only(search: Any) -> None:
    """There is nothing to choose."""
    pool = Scores(table(1, 0))
    winner, psnr, samples = search(solvers(1), VALIDATION, 64, pool)
    assert (winner, samples, pool.asked) == (0, 256, [])
    assert psnr == pytest.approx(pool.table.mean())
