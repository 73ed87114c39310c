"""A process that takes many points to their results at the same time, for trials that only wait for it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import torch

from orchestrator.results.store import ResultStore
from orchestrator.storage import Storage
from sweeps.points.execute import TrialContext, run_trial
from sweeps.space import Point

ANSWER_SECONDS = 30.0
"""After which a trial is told that there is nothing new, so that nobody waits for one that is gone."""

LOOK_SECONDS = 1.0


class Points:
    """Takes points to their results, each in a thread. What a runner does; its own state needs no lock.

    Args:
        context: Where everything is.
        lockstep: Whether a point waits after each validation until Tune knows of it: with early stopping, what is
            spent on a point must not depend on how fast Tune decides.
    """

    def __init__(self, context: TrialContext, lockstep: bool):
        torch.set_num_threads(1)
        self.context, self.lockstep = context, lockstep
        self.running: dict[str, _Running] = {}

    async def follow(self, point: dict[str, Any], after: float) -> tuple[list[dict[str, float]], bool]:
        """What there is to tell of this point, which is begun unless it is running: waits until there is something.

        Args:
            point: The point's content.
            after: The last iteration that the asking trial knows of, -1 for none; Tune has let it go on from there.

        Returns:
            The validations of later iterations, in order, and whether the point has its result.

        Raises:
            Exception: What the point failed with; asked again, it is tried again from its stored state.
        """
        wanted = Point.from_dict(point)
        running = self.running.get(wanted.key)
        if running is None:
            running = self.running[wanted.key] = _Running(wanted, self.context, self.lockstep)
        validations, ended = await running.news(after)
        if ended:
            if self.running.get(wanted.key) is running:
                del self.running[wanted.key]
            if running.error is not None:
                raise running.error
        return validations, ended


class _Running:
    """A point on its way to its result, in a thread."""

    def __init__(self, point: Point, context: TrialContext, lockstep: bool):
        self.point, self.context, self.lockstep = point, context, lockstep
        self.loop = asyncio.get_running_loop()
        self.asking: set[asyncio.Event] = set()
        self.validations: list[dict[str, float]] = []
        self.told = -1.0
        self.telling = threading.Condition()
        self.ended = False
        self.error: Exception | None = None
        threading.Thread(target=self._run, name=point.key, daemon=True).start()

    async def news(self, after: float) -> tuple[list[dict[str, float]], bool]:
        """Validations after this iteration, and whether that was all: waits a while for there to be any."""
        with self.telling:
            self.told = max(self.told, after)
            self.telling.notify_all()
        happened = asyncio.Event()
        self.asking.add(happened)
        if not (self.ended or self._after(after)):
            with suppress(TimeoutError):
                await asyncio.wait_for(happened.wait(), ANSWER_SECONDS)
        self.asking.discard(happened)
        ended = self.ended  # before the validations, of which the last may come between the two
        return self._after(after), ended

    def _after(self, iteration: float) -> list[dict[str, float]]:
        return [values for values in self.validations if values["iteration"] > iteration]

    def _happened(self) -> None:
        for event in self.asking:
            event.set()

    # ---- in the point's thread

    def _run(self) -> None:
        try:
            run_trial(self.point, self.context, self._report)
        except Exception as error:
            self.error = error
        self.ended = True
        self.loop.call_soon_threadsafe(self._happened)

    def _report(self, values: dict[str, float]) -> None:
        self.validations.append(values)
        self.loop.call_soon_threadsafe(self._happened)
        if self.lockstep:
            self._wait_until_told(values["iteration"])

    def _wait_until_told(self, iteration: float) -> None:
        """Until Tune lets the trial go on from this validation, or has marked its point as stopped."""
        store = ResultStore(Storage.at(self.context.storage), self.point.key)
        while not store.is_stopped():
            with self.telling:
                if self.telling.wait_for(lambda: self.told >= iteration, LOOK_SECONDS):
                    return
