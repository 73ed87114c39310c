"""Early stopping within cells: one ASHA per (family, NFE, guidance, seed), so PSNR is never compared across NFEs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler


class PerCellScheduler(FIFOScheduler):
    """Runs trials in order and forwards each result to the scheduler of the trial's cell.

    Args:
        make: Creates the scheduler of a new cell.
        cell_of: Maps a trial's configuration to its cell.
        stopped: Called with the configuration of each trial that its cell's scheduler stops, before Tune ends it.
    """

    def __init__(
        self,
        make: Callable[[], TrialScheduler],
        cell_of: Callable[[dict[str, Any]], str],
        stopped: Callable[[dict[str, Any]], None],
    ):
        super().__init__()
        self.make, self.cell_of, self.stopped = make, cell_of, stopped
        self.cells: dict[str, TrialScheduler] = {}

    def _cell(self, trial: Any) -> TrialScheduler:
        return self.cells.setdefault(self.cell_of(trial.config), self.make())

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._cell(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = self._cell(trial).on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped(trial.config)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._cell(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._cell(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._cell(trial).on_trial_error(tune_controller, trial)


def asha_per_cell(
    grace_validations: int,
    reduction_factor: int,
    max_validations: int,
    cell_of: Callable[[dict[str, Any]], str],
    stopped: Callable[[dict[str, Any]], None],
) -> PerCellScheduler:
    """ASHA within each cell, with rungs counted in validations."""
    make = partial(
        ASHAScheduler,
        time_attr="training_iteration",
        metric="psnr_db",
        mode="max",
        grace_period=grace_validations,
        # Beyond the last report, because a trial that gets there still has to write its result.
        max_t=max(max_validations, grace_validations) + 2,
        reduction_factor=reduction_factor,
        stop_last_trials=False,
    )
    return PerCellScheduler(make, cell_of, stopped)
