"""The Tune trainable: a process that has a runner compute a point's result, and reports its progress to Tune.

Tune starts a process for every trial. This module imports neither torch nor MLflow, so that such a process is small and
starts fast. Points are computed by runners (sweeps/points/runner.py), each of which serves many trials.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

FAILURE = "failure"
"""Key of a trial's last report if its point has failed; the value is a :class:`~orchestrator.errors.Failure`."""

Report = Callable[[dict[str, float]], None]
"""Called after every validation with iteration, psnr_db (the best so far), validation_psnr_db and loss."""


def trial(config: dict[str, Any], runners: Sequence[Any]) -> None:
    """The Tune trainable: one point, computed by one of these runners.

    A failure that no retry would change is reported as :data:`FAILURE`, because Tune retries a trial that raises.
    """
    from ray import tune

    try:
        follow(config["point"], runners, tune.report)
    except Exception as error:
        from orchestrator.errors import Failure, may_pass

        if may_pass(error):
            raise
        tune.report({FAILURE: Failure.of(error)})


def follow(point: dict[str, Any], runners: Sequence[Any], report: Report) -> None:
    """Wait until a runner has computed the result of this point.

    A caller that asks for a point already in progress joins it and receives its validations from the first one on. Ray
    restarts a lost runner, which resumes from the point's stored state.

    Args:
        point: The point as a dictionary.
        runners: Handles of :class:`~sweeps.points.runner.PointRunner` actors; a point always goes to the same one.
        report: Called once per validation; the point may wait for it to return before the next one.

    Raises:
        Exception: The error of the point.
    """
    import ray
    from ray.exceptions import RayTaskError

    content = json.dumps(point, sort_keys=True)
    runner = runners[zlib.crc32(content.encode()) % len(runners)]
    ask = runner.follow.options(max_task_retries=-1)
    after, finished = -1.0, False
    while not finished:
        try:
            validations, finished = ray.get(ask.remote(point, after))
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        for values in validations:
            report(values)
            after = values["iteration"]
