"""Runs several computations in lockstep, so that the requests they make at the same time are answered in one batch.

A computation is a generator that yields requests and receives their values. What is requested does not matter here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from orchestrator.pool.requests import Request

T = TypeVar("T")

Requests = Sequence[Request[Any]]
"""What one computation waits for."""


def run_in_lockstep(
    tasks: Sequence[Generator[Requests, list[Any], T]], answer: Callable[[list[Requests]], list[list[Any]]]
) -> list[T]:
    """Run all tasks to their end; their results, in order.

    Args:
        tasks: Generators. If one ends early, the others go on.
        answer: Called with the requests of all tasks that still run, in order of task. Returns the values of each
            task's requests.

    Raises:
        Exception: Whatever a task or ``answer`` raises; the other tasks are closed first.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Requests] = {}

    def proceed(number: int, values: list[Any] | None) -> None:
        try:
            waiting[number] = next(tasks[number]) if values is None else tasks[number].send(values)
        except StopIteration as stop:
            waiting.pop(number, None)
            results[number] = stop.value

    try:
        for number in range(len(tasks)):
            proceed(number, None)
        while waiting:
            numbers = list(waiting)
            for number, values in zip(numbers, answer(list(waiting.values())), strict=True):
                proceed(number, values)
    finally:
        for task in tasks:
            task.close()
    return [results[number] for number in range(len(tasks))]
