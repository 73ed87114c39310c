"""Shows the progress of a round of Ray Tune's trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune import Callback

from sweeps.point import AnyPoint, LearnedPoint, point_from_dict


class TrialProgress(Callback):
    """Progress of a round of trials, in iterations, so that its rate and remaining time are meaningful."""

    def __init__(self, progress: Any, points: Sequence[AnyPoint]):
        self.progress = progress
        self.total = {point.key: point.iterations for point in points}
        self.done = dict.fromkeys(self.total, 0)
        self.finished = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores its callbacks, and never loads them here; a bar cannot be stored

    def _advance(self, key: str, done: int) -> None:
        if done > self.done[key]:
            self.progress.update(done - self.done[key])
            self.done[key] = done
        self.progress.set_postfix_str(f" {self.finished}/{len(self.total)} trials", refresh=False)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        point = point_from_dict(trial.config["point"])
        if isinstance(point, LearnedPoint):
            self._advance(point.key, int(result.get("iteration", 0)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key = point_from_dict(trial.config["point"]).key
        self.finished += 1
        self._advance(key, self.total[key])
