"""Starts and baselines of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator import plugins
from orchestrator.pool.requests import LocalPool
from solvers.families.bns import BNS
from solvers.schedulers import CondOT
from sweeps.distil.starts import Starts, choose_starts, rivals, shortlist


class Scores:
    """A host at which the PSNR of a solver depends on its family alone, up to pairs.

    Args:
        nfe: Evaluations of all solvers.
        psnr: PSNR of a family, by its label.
    """

    def __init__(self, nfe: int, psnr: Callable[[str], float]):
        known = [*shortlist(nfe, CondOT()), *rivals(nfe, CondOT())]
        self.psnr = {tuple(c.solver.flat().tolist()): psnr(c.choice.label) for c in known}
        self.nfe, self.evaluations = nfe, 0

    def score_thetas(
        self, thetas: Sequence[npt.NDArray[np.float64]], pairs: str, metric: str, indices: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        self.evaluations += self.nfe * len(thetas) * len(indices)
        return [self.psnr[tuple(theta.tolist())] + 0.01 * np.array(indices) for theta in thetas]

    def choose(self, most: int | None) -> Starts:
        settings: dict[str, Any] = {"last_pairs": 32, "most_evaluations": most}
        chosen = choose_starts(self.nfe, CondOT(), "train", pool=LocalPool(self), **settings)
        assert chosen.evaluations == self.evaluations
        return chosen


@pytest.mark.parametrize("name", ["cond_ot", "vp", "cosine", "edm"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 8, 16, 20])
def test_every_path_and_nfe_has_starts(name: str, nfe: int) -> None:
    """They are few and distinct, and a BNS solver can start from each."""
    scheduler = plugins.build("schedulers", name)
    starts = shortlist(nfe, scheduler)
    assert 1 <= len(starts) <= 24
    assert len({tuple(start.solver.flat().tolist()) for start in starts}) == len(starts)
    assert {start.solver.nfe for start in starts} == {nfe}
    assert all(start.choice.may_start(BNS(), nfe, 1.0, scheduler) for start in starts)


@pytest.mark.parametrize("nfe", [8, 16])
def test_the_best_fixed_solver_need_not_be_a_start(nfe: int) -> None:
    """Midpoint and RK4 are poor starts, and so is AB4 at many evaluations."""
    chosen = Scores(
        nfe, lambda label: {"RK4": 60.0, "Midpoint": 55.0, "AB4": 50.0, "AB2": 40.0}.get(label, 30.0)
    ).choose(None)
    assert chosen.baseline is not None
    assert chosen.baseline.choice.label == "RK4"
    assert {start.choice.label for start in chosen.starts} == ({"AB4"} if nfe == 8 else {"AB2"})


def test_the_winner_of_the_starts_is_the_baseline_unless_a_rival_is_better() -> None:
    """The rivals race against it."""
    chosen = Scores(8, lambda label: 40.0 if label == "AB3" else 30.0).choose(None)
    assert chosen.baseline == chosen.starts[0]
    assert {start.choice.label for start in chosen.starts} == {"AB3"}


@pytest.mark.parametrize("nfe", [5, 8, 16])
def test_the_races_keep_to_their_evaluations(nfe: int) -> None:
    """Without evaluations for the rivals, only the shortlist races."""
    least = nfe * len(shortlist(nfe, CondOT()))
    for most in (least, least + 1, 2 * least, 5 * least, 20 * least):
        chosen = Scores(nfe, lambda label: 40.0 if label == "AB3" else 30.0).choose(most)
        assert chosen.evaluations <= most
        assert chosen.baseline == chosen.starts[0]
    with pytest.raises(ValueError, match=f"takes at least {least} evaluations, but may spend {least - 1}"):
        Scores(nfe, lambda label: 30.0).choose(least - 1)


def test_without_finite_samples_there_is_neither() -> None:
    """The caller says so."""
    chosen = Scores(8, lambda label: float("nan")).choose(None)
    assert (chosen.starts, chosen.baseline) == ([], None)
