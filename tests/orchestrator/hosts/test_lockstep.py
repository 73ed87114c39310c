"""Lockstep: each task runs as it does alone, and requests made at the same time are answered in one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.hosts.lockstep import Requests, run_in_lockstep
from orchestrator.pool.requests import Ask, Request


def _task(name: str, requests: int) -> Callable[[Ask], str]:
    """A task that makes this many requests, each for its number plus one, and returns its name and last number."""

    def run(ask: Ask) -> str:
        number = 0
        for _ in range(requests):
            (number,) = ask([Request("next", {"of": name, "number": number})])
        return f"{name}{number}"

    return run


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


def test_only_one_task_runs_at_a_time() -> None:
    """Threads only serve to wait, so nothing depends on how they are scheduled."""
    running: list[int] = []
    concurrent: list[int] = []

    def task(ask: Ask) -> None:
        for _ in range(20):
            running.append(1)
            concurrent.append(len(running))
            sum(range(2000))
            running.pop()
            ask([Request("next", {"number": 0})])

    run_in_lockstep([task] * 4, _add_one)
    assert max(concurrent) == 1


def test_requests_are_answered_in_the_callers_thread() -> None:
    """Thread-local state, such as autograd's modes, is therefore the caller's."""
    threads = set()

    def answer(groups: list[Requests]) -> list[list[Any]]:
        threads.add(threading.current_thread())
        return _add_one(groups)

    run_in_lockstep([_task("a", 2)] * 2, answer)
    assert threads == {threading.current_thread()}


def _failing(ask: Ask) -> str:
    ask([Request("next", {"of": "f", "number": 0})])
    raise ArithmeticError("the second step failed")


def test_an_error_of_a_task_is_raised_in_the_caller() -> None:
    with pytest.raises(ArithmeticError, match="the second step failed"):
        run_in_lockstep([_task("a", 3), _failing, _task("b", 3)], _add_one)


@pytest.mark.parametrize("failing", ["task", "answer"])
def test_after_an_error_no_thread_waits_for_an_answer(failing: str) -> None:
    """A host outlives a failed call, so its threads must not accumulate."""

    def refuse(groups: list[Requests]) -> list[list[Any]]:
        raise ArithmeticError("no answer")

    before = threading.active_count()
    with pytest.raises(ArithmeticError):
        run_in_lockstep([_task("a", 3), _failing], _add_one if failing == "task" else refuse)
    assert threading.active_count() == before


def test_no_tasks_return_no_results() -> None:
    assert run_in_lockstep([], _add_one) == []
