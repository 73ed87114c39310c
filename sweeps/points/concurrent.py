"""Runs many points concurrently in one process, on behalf of trials that only wait for it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import torch

from orchestrator.results.store import ResultStore
from orchestrator.storage import Storage
from sweeps.point import AnyPoint, point_from_dict
from sweeps.points.execute import TrialContext, run_trial

ANSWER_SECONDS = 30.0
"""Time after which a waiting trial gets an empty answer. Calls of trials that are gone thus end as well."""

STOP_POLL_SECONDS = 1.0
"""Interval at which a point that waits for Tune checks whether it has been stopped."""


class Points:
    """Computes the results of points, each in its own thread; the implementation of a runner.

    Its own state is used by the event loop only and needs no lock.

    Args:
        context: Addresses and facts that the points need.
        wait_for_tune: Whether a point waits after each validation until Tune has received it. With early stopping, the
            work spent on a point must not depend on how fast Tune decides.
    """

    def __init__(self, context: TrialContext, wait_for_tune: bool):
        torch.set_num_threads(1)
        self.context, self.wait_for_tune = context, wait_for_tune
        self.running: dict[str, _Running] = {}
        self.waiting = 0
        self.closing = False

    async def follow(self, point: dict[str, Any], after: float) -> tuple[list[dict[str, float]], bool]:
        """Wait for validations of a point, which is started unless it is running.

        Args:
            point: The point as a dictionary.
            after: Last iteration that the trial has received and Tune has let continue; -1 for none.

        Returns:
            The validations of later iterations, in order, and whether the point has its result.

        Raises:
            Exception: The error of the point. A further call resumes it from its stored state.
        """
        if self.closing:
            return [], True
        requested = point_from_dict(point)
        running = self.running.get(requested.key)
        if running is None:
            running = self.running[requested.key] = _Running(requested, self.context, self.wait_for_tune)
        self.waiting += 1
        try:
            validations, ended = await running.wait_for_validations(after)
        finally:
            self.waiting -= 1
        if self.closing:
            return [], True
        if ended:
            if self.running.get(requested.key) is running:
                del self.running[requested.key]
            if running.error is not None:
                raise running.error
        return validations, ended

    async def close(self) -> None:
        """Answer all waiting calls of :meth:`follow`, and any later one, as if their points had ended.

        A call that is still waiting when its actor is killed would be reported by Ray as a failed task.
        """
        self.closing = True
        for running in self.running.values():
            running.notify()
        while self.waiting:
            await asyncio.sleep(0.01)


class _Running:
    """A point that is being computed in its own thread."""

    def __init__(self, point: AnyPoint, context: TrialContext, wait_for_tune: bool):
        self.point, self.context, self.wait_for_tune = point, context, wait_for_tune
        self.loop = asyncio.get_running_loop()
        self.waiters: set[asyncio.Event] = set()
        self.validations: list[dict[str, float]] = []
        self.acknowledged = -1.0
        self.acknowledgement = threading.Condition()
        self.ended = False
        self.error: Exception | None = None
        threading.Thread(target=self._run, name=point.key, daemon=True).start()

    async def wait_for_validations(self, after: float) -> tuple[list[dict[str, float]], bool]:
        """Validations after this iteration, and whether the point has ended; waits up to ANSWER_SECONDS for one."""
        with self.acknowledgement:
            self.acknowledged = max(self.acknowledged, after)
            self.acknowledgement.notify_all()
        changed = asyncio.Event()
        self.waiters.add(changed)
        if not (self.ended or self._after(after)):
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), ANSWER_SECONDS)
        self.waiters.discard(changed)
        ended = self.ended  # read first, because the last validation may arrive between the two reads
        return self._after(after), ended

    def _after(self, iteration: float) -> list[dict[str, float]]:
        return [values for values in self.validations if values["iteration"] > iteration]

    def notify(self) -> None:
        """Wake every waiting call. Called in the event loop."""
        for event in self.waiters:
            event.set()

    # ---- in the point's thread

    def _run(self) -> None:
        try:
            run_trial(self.point, self.context, self._report)
        except Exception as error:
            self.error = error
        self.ended = True
        self.loop.call_soon_threadsafe(self.notify)

    def _report(self, values: dict[str, float]) -> None:
        self.validations.append(values)
        self.loop.call_soon_threadsafe(self.notify)
        if self.wait_for_tune:
            self._wait_for_acknowledgement(values["iteration"])

    def _wait_for_acknowledgement(self, iteration: float) -> None:
        """Wait until Tune lets the trial continue after this validation, or its point is marked as stopped."""
        store = ResultStore(Storage.at(self.context.storage), self.point.key)
        while not store.is_stopped():
            with self.acknowledgement:
                if self.acknowledgement.wait_for(lambda: self.acknowledged >= iteration, STOP_POLL_SECONDS):
                    return
