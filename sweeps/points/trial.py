"""What Ray Tune runs for a point: a process that asks a runner to take it to its result, and tells Tune how that goes.

Tune gives every trial a process of its own. This module imports neither torch nor MLflow, so that such a process is
small and starts fast; what a point takes is done by runners (sweeps/points/runner.py), each for many trials.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Report = Callable[[dict[str, float]], None]
"""Told of every validation: iteration, psnr_db (the best so far), validation_psnr_db and loss."""


def trial(config: dict[str, Any], runners: Sequence[Any]) -> None:
    """The Tune trainable: one point, taken to its result by one of these actors."""
    from ray import tune

    follow(config["point"], runners, tune.report)


def follow(point: dict[str, Any], runners: Sequence[Any], report: Report) -> None:
    """Wait until a runner has taken this point to its result.

    Whoever asks for a point that the runner is at already joins in, and is told of its validations from the first. A
    runner that is lost is started again by Ray, and goes on from the point's stored state.

    Args:
        point: A point's content.
        runners: Handles of :class:`~sweeps.points.runner.PointRunner` actors; a point always goes to the same one.
        report: Told of every validation, once; the next one may wait until it returns.

    Raises:
        Exception: What the point failed with.
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
                raise error.cause from None
            raise
        for values in validations:
            report(values)
            after = values["iteration"]
