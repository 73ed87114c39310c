"""Early stopping within cells: PSNR is never compared across NFEs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from sweeps.cell_scheduler import PerCellScheduler, asha_per_cell

GRACE = 2


@dataclass(eq=False)
class FakeTrial:
    """The part of a trial that schedulers read."""

    cell: str
    name: str
    trial_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trial_id = self.name
        self.config = {"cell": self.cell, "name": self.name}


@pytest.fixture
def stopped() -> list[str]:
    """Names of the trials that the scheduler reported as stopped."""
    return []


@pytest.fixture
def scheduler(stopped: list[str]) -> PerCellScheduler:
    """ASHA in each cell: after two validations the better half continues."""
    return asha_per_cell(
        grace_validations=GRACE,
        reduction_factor=2,
        max_validations=10,
        cell_of=lambda config: config["cell"],
        stopped=lambda config: stopped.append(config["name"]),
    )


def _feed(scheduler: TrialScheduler, trials: list[tuple[FakeTrial, float]]) -> dict[str, str]:
    """Report from every trial until the grace period is over; return the last decision for each."""
    for trial, _ in trials:
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    decisions: dict[str, str] = {}
    for validation in range(1, GRACE + 1):
        for trial, psnr in trials:
            result = {"training_iteration": validation, "psnr_db": psnr}
            decisions[trial.name] = scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]
    return decisions


def _two_cells() -> Iterator[tuple[FakeTrial, float]]:
    """Four trials around 60 dB at NFE 16, then four around 20 dB at NFE 4, each cell with its best trial first."""
    for cell, best in (("nfe16", 60.0), ("nfe4", 20.0)):
        for rank in range(4):
            yield FakeTrial(cell, f"{cell} rank {rank}"), best - rank


def test_the_best_trial_of_a_cell_is_not_stopped_by_a_cell_of_higher_psnr(
    scheduler: PerCellScheduler, stopped: list[str]
) -> None:
    """20 dB is the best value at NFE 4, so that trial continues; the worst trial of each cell is stopped."""
    decisions = _feed(scheduler, list(_two_cells()))
    assert decisions["nfe4 rank 0"] == decisions["nfe16 rank 0"] == TrialScheduler.CONTINUE
    assert decisions["nfe4 rank 3"] == decisions["nfe16 rank 3"] == TrialScheduler.STOP
    assert set(stopped) == {name for name, decision in decisions.items() if decision == TrialScheduler.STOP}


def test_a_single_scheduler_for_all_cells_would_stop_the_whole_cell(scheduler: PerCellScheduler) -> None:
    """This is the reason for one scheduler per cell: a single ASHA stops every trial at low NFE."""
    decisions = _feed(scheduler.make(), list(_two_cells()))
    assert all(decisions[f"nfe4 rank {rank}"] == TrialScheduler.STOP for rank in range(4))


def test_no_trial_is_stopped_during_the_grace_period(scheduler: PerCellScheduler, stopped: list[str]) -> None:
    """A slow start does not make a bad trial."""
    trials = list(_two_cells())
    for trial, _ in trials:
        scheduler.on_trial_add(None, trial)
    for trial, psnr in trials:
        result = {"training_iteration": 1, "psnr_db": psnr}
        assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
    assert stopped == []


def test_a_trial_may_write_its_result_after_its_last_validation(scheduler: PerCellScheduler) -> None:
    """ASHA stops trials at max_t. It must lie beyond the last report, otherwise the result would be lost."""
    trial = FakeTrial("nfe4", "alone")
    scheduler.on_trial_add(None, trial)
    for validation in range(1, 12):  # the start and ten validations
        result = {"training_iteration": validation, "psnr_db": 20.0}
        assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, trial, result)


def test_each_cell_has_its_own_scheduler(scheduler: PerCellScheduler) -> None:
    """It is made when the first trial of the cell is added."""
    _feed(scheduler, list(_two_cells()))
    assert set(scheduler.cells) == {"nfe4", "nfe16"}
    assert scheduler.cells["nfe4"] is not scheduler.cells["nfe16"]
