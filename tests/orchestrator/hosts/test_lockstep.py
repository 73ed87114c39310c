"""Lockstep: each task runs as it does alone, and requests made at the same time are answered in one batch."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from orchestrator.hosts.lockstep import Requests, run_in_lockstep
from orchestrator.pool.requests import Request

Task = Generator[Requests, list[Any], str]


def _task(name: str, requests: int, closed: list[str] | None = None) -> Task:
    """A task that makes this many requests, each for its number plus one, and returns its name and last number."""
    number = 0
    try:
        for _ in range(requests):
            (number,) = yield [Request("next", {"of": name, "number": number})]
    finally:
        if closed is not None:
            closed.append(name)
    return f"{name}{number}"


def _add_one(groups: list[Requests]) -> list[list[Any]]:
    return [[request.arguments["number"] + 1 for request in group] for group in groups]


def test_every_task_gets_its_own_answers() -> None:
    """Each result is that of the task alone."""
    assert run_in_lockstep([_task("a", 2), _task("b", 5), _task("c", 0)], _add_one) == ["a2", "b5", "c0"]


def test_requests_of_one_round_are_answered_in_one_call_in_task_order() -> None:
    """A task that ends makes no more requests; the others go on."""
    rounds: list[list[str]] = []

    def answer(groups: list[Requests]) -> list[list[Any]]:
        rounds.append([group[0].arguments["of"] for group in groups])
        return _add_one(groups)

    run_in_lockstep([_task("a", 1), _task("b", 3), _task("c", 2)], answer)
    assert rounds == [["a", "b", "c"], ["b", "c"], ["b"]]


def _failing() -> Task:
    yield [Request("next", {"of": "f", "number": 0})]
    raise ArithmeticError("the second step failed")


def test_an_error_of_a_task_is_raised_in_the_caller() -> None:
    with pytest.raises(ArithmeticError, match="the second step failed"):
        run_in_lockstep([_task("a", 3), _failing(), _task("b", 3)], _add_one)


@pytest.mark.parametrize("failing", ["task", "answer"])
def test_after_an_error_the_other_tasks_are_closed(failing: str) -> None:
    """A host outlives a failed call, so nothing of it may stay behind."""
    closed: list[str] = []

    def refuse(groups: list[Requests]) -> list[list[Any]]:
        raise ArithmeticError("no answer")

    tasks = [_task("a", 3, closed), _failing(), _task("b", 3, closed)]
    with pytest.raises(ArithmeticError):
        run_in_lockstep(tasks, _add_one if failing == "task" else refuse)
    assert sorted(closed) == ["a", "b"]


def test_no_tasks_return_no_results() -> None:
    assert run_in_lockstep([], _add_one) == []
