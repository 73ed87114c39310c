"""Runs several computations in lockstep, so that the requests they make at the same time are answered in one batch.

A task is an ordinary function that calls ``ask`` and waits for the answers; the same code also runs alone. Each task
has a thread to wait in, but only one thread runs at any time, so results do not depend on thread scheduling. This
module does not depend on what is requested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from orchestrator.pool.requests import Ask, Request

T = TypeVar("T")
R = TypeVar("R")

Requests = Sequence[Request[Any]]
"""What one task waits for."""


def run_in_lockstep(
    tasks: Sequence[Callable[[Ask], T]], answer: Callable[[list[Requests]], list[list[Any]]]
) -> list[T]:
    """Run all tasks and return their results, in order.

    Args:
        tasks: Functions of ``ask``. If one ends early, the others go on.
        answer: Called in the caller's thread with the requests of all tasks that still run, in the order of the tasks.
            Returns the answers to each group.

    Raises:
        Exception: Any exception of a task or of ``answer``; the other tasks are ended first.
    """
    runs = [_Run(task) for task in tasks]
    try:
        for run in runs:
            run.begin()
        while waiting := [run for run in runs if run.requests is not None]:
            answers = answer([run.requests for run in waiting if run.requests is not None])
            for run, answers_of_run in zip(waiting, answers, strict=True):
                run.proceed(answers_of_run)
    finally:
        for run in runs:
            run.end()
    return [run.result() for run in runs]


class _Ended(BaseException):
    """Unwinds a task whose answers will not come. Not an ``Exception``, so that the task cannot handle it."""


class _Run(Generic[T]):
    """A task and the thread it waits in."""

    def __init__(self, task: Callable[[Ask], T]):
        self.requests: Requests | None = None
        self._task = task
        self._results: list[T] = []
        self._failure: BaseException | None = None
        self._answers: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        """Run up to the first request, or to the end."""
        self._thread.start()
        self._wait()

    def proceed(self, answers: list[Any]) -> None:
        """Continue with these answers, up to the next request or to the end."""
        self._answers.put(answers)
        self._wait()

    def end(self) -> None:
        """End the thread if it still waits for answers."""
        if self._thread.ident is not None:
            self._answers.put(None)
            self._thread.join()

    def result(self) -> T:
        (result,) = self._results
        return result

    def _wait(self) -> None:
        self._pauses.get()
        if self._failure is not None:
            raise self._failure

    def _ask(self, requests: Sequence[Request[R]], /) -> list[R]:
        self.requests = requests
        self._pauses.put(None)
        answers = self._answers.get()
        if answers is None:
            raise _Ended
        return answers

    def _run(self) -> None:
        try:
            self._results.append(self._task(self._ask))
        except _Ended:
            pass
        except BaseException as failure:  # raised again in the caller's thread
            self._failure = failure
        finally:
            self.requests = None
            self._pauses.put(None)
