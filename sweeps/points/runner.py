"""The actor that takes points to their results for many trials. Ray loads its class wherever somebody has its handle.

That is in every trial, so this module imports neither torch nor MLflow: the actor itself does when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from sweeps.points.execute import TrialContext

TRIALS = 16
"""Trials at once for which a runner is started: their Python is a few ms a validation, in threads of one process."""


class PointRunner:
    """:class:`~sweeps.points.concurrent.Points` as an asyncio actor."""

    def __init__(self, context: Any, lockstep: bool):
        from sweeps.points.concurrent import Points

        self.points = Points(context, lockstep)

    async def follow(self, point: dict[str, Any], after: float) -> tuple[list[dict[str, float]], bool]:
        return await self.points.follow(point, after)


def start_runners(count: int, context: TrialContext, *, lockstep: bool) -> list[Any]:
    """Start so many actors, spread over the nodes; handles for :func:`~sweeps.points.trial.follow`."""
    from orchestrator.pool.router import thread_limits

    actor = ray.remote(PointRunner).options(
        num_cpus=0,  # what they work for has been counted as trials
        max_concurrency=10_000,
        max_restarts=-1,
        scheduling_strategy="SPREAD",
        # Points block in threads of their own, never in the event loop.
        runtime_env={"env_vars": thread_limits(1) | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}},
    )
    return [actor.remote(context, lockstep) for _ in range(count)]


def end_runners(runners: Sequence[Any]) -> None:
    """End them, and whatever they are at: its state is stored."""
    for runner in runners:
        with suppress(Exception):  # a cluster that is gone has ended them
            ray.kill(runner)
