"""The recipe of a distillation at the least cost, on a tiny network in this process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from distil_place import CountingPool, KilledError, tiny_place

from orchestrator.errors import UserError
from sweeps.distil.outcome import DistilOutcome
from sweeps.distil.plan import Plan
from sweeps.distil.recipe import distil
from sweeps.distil.settings import DistilSettings

SETTINGS = DistilSettings(nfe=(3,), budget=20_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distil")


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> tuple[DistilOutcome, CountingPool]:
    """A distillation, and the pool that served it."""
    place = tiny_place(root / "undisturbed")
    return distil(place, SETTINGS), cast(CountingPool, place.pool)


def test_theta_is_better_than_the_best_fixed_solver(undisturbed: tuple[DistilOutcome, CountingPool]) -> None:
    (result,) = undisturbed[0].results.values()
    assert result.gain_db > 5
    assert result.artifact.solver.nfe == result.nfe == 3
    assert result.artifact.validation_psnr_db == result.psnr_db == max(psnr for _, psnr in result.history)
    assert result.history[0][1] == result.start_psnr_db
    assert [spent for spent, _ in result.history] == sorted(spent for spent, _ in result.history)


def test_the_bill_holds_what_was_spent(root: Path, undisturbed: tuple[DistilOutcome, CountingPool]) -> None:
    """Evaluations that were reported as spent are those on the bill, and a finished distillation costs them again."""
    reported: list[int] = []
    place = tiny_place(root / "undisturbed")
    outcome = distil(place, SETTINGS, on_spend=reported.append)
    for bill in (undisturbed[0].bill, outcome.bill):
        cost = bill.total().cost
        assert cost is not None
        assert cost.evaluations == sum(reported)
    assert {line.item for line in outcome.bill.items()} == {
        "examination",
        "pairs",
        "grid search",
        "distillation",
        "validation",
        "report",
    }
    counts = cast(CountingPool, place.pool).counts
    assert counts.total() == counts["schedule"]  # which evaluates nothing
    assert outcome.results[3].artifact.digest == undisturbed[0].results[3].artifact.digest


@pytest.mark.parametrize("budget", [16_000, 17_500, 19_000, 24_000])
def test_a_budget_is_kept(root: Path, budget: int) -> None:
    """Never more than 5 % above; and it is used, unless validation stops improving."""
    outcome = distil(tiny_place(root / "budgets"), DistilSettings(nfe=(3,), budget=budget))
    cost = outcome.bill.total().cost
    assert cost is not None
    assert cost.evaluations <= 1.05 * budget
    assert cost.evaluations >= 0.85 * budget or outcome.results[3].status != "budget"


def test_too_small_a_budget_is_refused_with_the_least_that_would_do(root: Path) -> None:
    with pytest.raises(UserError, match="a budget of 2,000 velocity evaluations is too small") as refusal:
        distil(tiny_place(root / "refused"), DistilSettings(nfe=(3,), budget=2_000))
    plans: list[Plan] = []
    distil(tiny_place(root / "budgets"), DistilSettings(nfe=(3,), budget=16_000), on_plan=plans.append)
    assert f"take {plans[0].least:,};" in str(refusal.value)
    assert "distillations" in "".join(path.name for path in (root / "refused").iterdir())
    assert not (root / "refused" / "pairs").exists()


def test_the_least_budget_gives_a_theta(root: Path) -> None:
    """The number in the refusal is true."""
    plans: list[Plan] = []
    with pytest.raises(UserError):
        distil(tiny_place(root / "least"), DistilSettings(nfe=(3,), budget=1), on_plan=plans.append)
    assert not plans
    with pytest.raises(UserError, match="too small") as refusal:
        distil(tiny_place(root / "least"), DistilSettings(nfe=(3,), budget=1))
    least = int(str(refusal.value).split("take ")[1].split(";")[0].replace(",", ""))
    result = distil(tiny_place(root / "least"), DistilSettings(nfe=(3,), budget=least)).results[3]
    assert result.psnr_db > result.best_fixed_psnr_db


def test_a_killed_distillation_goes_on_where_it_was(
    root: Path, undisturbed: tuple[DistilOutcome, CountingPool]
) -> None:
    """Killed at every fifth request, it repeats at most the iteration that was under way, and theta is the same."""
    whole, pool = undisturbed
    answered, kills = 0, 0
    while True:
        place = tiny_place(root / "killed", kill_at=5)
        counts = cast(CountingPool, place.pool).counts
        try:
            outcome = distil(place, SETTINGS)
            break
        except KilledError:
            kills += 1
        finally:
            answered += counts.total()
    result, reference = outcome.results[3], whole.results[3]
    assert (result.artifact.digest, result.history) == (reference.artifact.digest, reference.history)
    assert outcome.bill.total().texts[:3] == whole.bill.total().texts[:3]
    assert kills >= pool.counts.total() // 5
    assert answered - kills <= pool.counts.total()
