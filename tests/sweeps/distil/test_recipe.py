"""The recipe of a distillation at the least cost, on a tiny network in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from distil_place import CountingPool, KilledError, tiny_place

from orchestrator.errors import UserError
from solvers.distil.sizes import Sizes, sizes
from sweeps.distil.outcome import DistilOutcome
from sweeps.distil.plan import Plan, make_plan
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


def test_pairs_that_cost_too_much_end_it_with_the_budget_that_would_do(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pair takes is known once the first ones are made; they are kept for the next command."""

    def scarce(*arguments: Any, **options: Any) -> Plan:
        return replace(make_plan(*arguments, **options), least_after_pairs=10**6)

    monkeypatch.setattr("sweeps.distil.recipe.make_plan", scarce)
    with pytest.raises(UserError, match=r"pairs of .* took more evaluations .* at least 1,0\d\d,\d{3}, which uses"):
        distil(tiny_place(root / "costly"), DistilSettings(nfe=(3,), budget=30_000))
    monkeypatch.undo()
    place = tiny_place(root / "costly")
    assert distil(place, DistilSettings(nfe=(3,), budget=30_000)).results[3].gain_db > 0
    assert cast(CountingPool, place.pool).counts["choose_steps"] == 0


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


def test_several_nfes_share_pairs_and_the_budget(root: Path) -> None:
    settings = DistilSettings(nfe=(2, 4), budget=32_000)
    place = tiny_place(root / "several")
    outcome = distil(place, settings)
    cost = outcome.bill.total().cost
    assert cost is not None
    assert cost.evaluations <= 1.05 * 32_000
    assert list(outcome.results) == [2, 4]
    assert all(result.gain_db > 3 for result in outcome.results.values())
    two, four = outcome.results.values()
    assert two.history[-1][0] <= four.history[0][0]
    parts = [line.part for line in outcome.bill.lines() if line.item == "pairs"]
    assert parts[:3] == ["choice of steps at 0.0001", "train at 0.0001", "validation at 0.0001"]
    assert len(parts) == len(set(parts))


def test_equal_settings_give_equal_thetas_and_another_seed_another(
    root: Path, undisturbed: tuple[DistilOutcome, CountingPool]
) -> None:
    """In another storage, too, and whatever pairs are there already."""
    place = tiny_place(root / "again")
    other = distil(place, replace(SETTINGS, seed=1)).results[3]
    same = distil(place, SETTINGS).results[3]
    first = undisturbed[0].results[3]
    assert (same.artifact.digest, same.history) == (first.artifact.digest, first.history)
    assert other.artifact.digest != first.artifact.digest
    assert other.validation == first.validation
    assert other.train != first.train


def test_overfitting_is_answered_by_more_training_pairs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pairs of six numbers are too few; without a budget the set grows until theta is as good on others."""
    monkeypatch.setattr("sweeps.distil.plan.sizes", lambda *arguments: replace(sizes(*arguments), train=8))
    result = distil(tiny_place(root / "few"), DistilSettings(nfe=(3,))).results[3]
    assert result.training_pairs > 8
    assert any("more on 8 training pairs than on others; it went on with 16" in note for note in result.notes)
    while True:  # a command that is killed after the growth goes on with as many pairs
        try:
            resumed = distil(tiny_place(root / "few-killed", kill_at=40), DistilSettings(nfe=(3,))).results[3]
            break
        except KilledError:
            continue
    assert (resumed.artifact.digest, resumed.history) == (result.artifact.digest, result.history)
    monkeypatch.setattr(Sizes, "more_train", lambda self, train: None)
    stayed = distil(tiny_place(root / "stayed"), DistilSettings(nfe=(3,))).results[3]
    assert (stayed.training_pairs, stayed.notes) == (8, [])
    assert result.psnr_db > stayed.psnr_db


def test_ground_truth_is_as_accurate_as_theta_needs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A theta that comes near the accuracy of the pairs is measured, and goes on, on more accurate ones."""
    monkeypatch.setattr("sweeps.distil.plan.FIRST_TOLERANCE", 1e-3)
    settings = DistilSettings(nfe=(4,), budget=40_000)
    outcome = distil(tiny_place(root / "accurate"), settings)
    result = outcome.results[4]
    assert any("came near the accuracy of ground truth at tolerance 0.001" in note for note in result.notes)
    (truth,) = outcome.truths.values()
    assert truth.spec.rtol < 1e-3
    assert truth.spec.digest in result.validation[1.0]
    assert truth.facts.accuracy_db is not None
    assert truth.facts.accuracy_db >= result.psnr_db + 10
    again = distil(tiny_place(root / "accurate"), settings)
    assert again.results[4].artifact.digest == result.artifact.digest
    assert again.bill.total().texts[:3] == outcome.bill.total().texts[:3]


def test_one_theta_serves_a_range_of_guidance_scales(root: Path) -> None:
    settings = DistilSettings(nfe=(3,), guidance_scale=(1.0, 2.0), budget=90_000)
    outcome = distil(tiny_place(root / "range"), settings)
    result = outcome.results[3]
    assert result.artifact.guidance_range == (1.0, 2.0)
    assert sorted(result.validation) == sorted(outcome.truths) == [1.0, 1.5, 2.0]
    assert set(result.artifact.validation_psnr_db_by_scale) == {1.0, 1.5, 2.0}
    assert result.artifact.at(guidance_scale=1.3).solver.nfe == 3
    assert result.gain_db > 3
    cost = outcome.bill.total().cost
    assert cost is not None
    assert cost.evaluations <= 1.05 * 90_000
    assert cost.evaluations < cost.forwards < 2 * cost.evaluations  # of guidance 1, one forward per evaluation
