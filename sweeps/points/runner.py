"""The actor that computes the results of points for many trials.

Ray loads the actor's class in every process that holds a handle, which every trial does. So this module imports neither
torch nor MLflow; the actor imports them when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from sweeps.points.execute import TrialContext

TRIALS = 16
"""Concurrent trials per runner. Their Python code takes a few ms per validation, in threads of one process."""

CLOSING_SECONDS = 3.0
"""Time that runners get to answer their waiting trials before they are killed."""


class PointRunner:
    """:class:`~sweeps.points.concurrent.Points` as an asyncio actor."""

    def __init__(self, context: Any, wait_for_tune: bool):
        from sweeps.points.concurrent import Points

        self.points = Points(context, wait_for_tune)

    async def follow(self, point: dict[str, Any], after: float) -> tuple[list[dict[str, float]], bool]:
        """See :meth:`sweeps.points.concurrent.Points.follow`."""
        return await self.points.follow(point, after)

    async def close(self) -> None:
        """See :meth:`sweeps.points.concurrent.Points.close`."""
        await self.points.close()


def start_runners(count: int, context: TrialContext, *, wait_for_tune: bool) -> list[Any]:
    """Start ``count`` actors, spread over the nodes; returns handles for :func:`~sweeps.points.trial.follow`."""
    from orchestrator.pool.router import thread_limits

    actor = ray.remote(PointRunner).options(
        num_cpus=0,  # their work is already counted as that of the trials
        max_concurrency=10_000,
        max_restarts=-1,
        scheduling_strategy="SPREAD",
        # Points block in their own threads, never in the event loop.
        runtime_env={"env_vars": thread_limits(1) | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}},
    )
    return [actor.remote(context, wait_for_tune) for _ in range(count)]


def end_runners(runners: Sequence[Any]) -> None:
    """Stop the runners and the points they are computing, whose state is stored."""
    with suppress(Exception):
        ray.get([runner.close.remote() for runner in runners], timeout=CLOSING_SECONDS)
    for runner in runners:
        with suppress(Exception):  # if the cluster is gone, so are they
            ray.kill(runner)
