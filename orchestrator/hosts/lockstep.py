"""Several computations that ask questions, advanced in step: what they ask at the same time is answered together.

A task is an ordinary function that calls ``ask`` and waits for the answer: the very code that runs alone. Each has a
thread of its own to wait in, and only one of them ever runs, so that nothing depends on how threads are scheduled.
Knows nothing of what is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

R = TypeVar("R")

Ask = Callable[[str, Sequence[dict[str, Any]]], list[Any]]
"""``ask(method, calls)``: the answers of a method to each of these keyword arguments, in order."""


class Question(NamedTuple):
    """What one task waits for: a method, and the keyword arguments of each call to it."""

    method: str
    calls: Sequence[dict[str, Any]]


def in_step(tasks: Sequence[Callable[[Ask], R]], answer: Callable[[list[Question]], list[list[Any]]]) -> list[R]:
    """The results of all tasks, in order.

    Args:
        tasks: Functions of ``ask``. One that ends early leaves the others to go on.
        answer: Called in the caller's thread with the questions of all tasks that still run, in order of task; gives
            the answers of each, one a call.

    Raises:
        Exception: Whatever a task or ``answer`` raises; the other tasks are ended first.
    """
    runs = [_Run(task) for task in tasks]
    try:
        for run in runs:
            run.begin()
        while waiting := [run for run in runs if run.question is not None]:
            answers = answer([run.question for run in waiting if run.question is not None])
            for run, found in zip(waiting, answers, strict=True):
                run.proceed(found)
    finally:
        for run in runs:
            run.end()
    return [run.result() for run in runs]


class _Ended(BaseException):
    """Unwinds a task whose answer will not come; no Exception, so that the task does not handle it."""


class _Run(Generic[R]):
    """A task and the thread it waits in."""

    def __init__(self, task: Callable[[Ask], R]):
        self.question: Question | None = None
        self._task = task
        self._results: list[R] = []
        self._failure: BaseException | None = None
        self._answers: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        """Run up to the first question, or to the end."""
        self._thread.start()
        self._wait()

    def proceed(self, answers: list[Any]) -> None:
        """Run on with these answers up to the next question, or to the end."""
        self._answers.put(answers)
        self._wait()

    def end(self) -> None:
        """Leave no thread behind that waits for an answer."""
        if self._thread.ident is not None:
            self._answers.put(None)
            self._thread.join()

    def result(self) -> R:
        (result,) = self._results
        return result

    def _wait(self) -> None:
        self._pauses.get()
        if self._failure is not None:
            raise self._failure

    def _ask(self, method: str, calls: Sequence[dict[str, Any]]) -> list[Any]:
        self.question = Question(method, calls)
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
        except BaseException as failure:  # the caller's to raise
            self._failure = failure
        finally:
            self.question = None
            self._pauses.put(None)
