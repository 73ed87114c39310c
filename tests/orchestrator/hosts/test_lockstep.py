"""Computations advanced in step: each runs as it does alone, and what they ask at the same time is answered at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.hosts.lockstep import Ask, RequestGroup, run_in_lockstep


def _task(name: str, questions: int) -> Callable[[Ask], str]:
    """Asks ``questions`` times for the number it had and one more; gives what it has in the end."""

    def run(ask: Ask) -> str:
        number = 0
        for _ in range(questions):
            (number,) = ask("next", [{"of": name, "number": number}])
        return f"{name}{number}"

    return run


def _add_one(questions: list[RequestGroup]) -> list[list[Any]]:
    return [[call["number"] + 1 for call in question.arguments] for question in questions]


def test_every_task_has_its_own_answers() -> None:
    """Whatever the company, the result is that of the task alone."""
    assert run_in_lockstep([_task("a", 2), _task("b", 5), _task("c", 0)], _add_one) == ["a2", "b5", "c0"]


def test_questions_of_one_round_come_together_in_order_of_task() -> None:
    """A task that ends leaves the round; the others go on."""
    rounds: list[list[str]] = []

    def answer(questions: list[RequestGroup]) -> list[list[Any]]:
        rounds.append([question.arguments[0]["of"] for question in questions])
        return _add_one(questions)

    run_in_lockstep([_task("a", 1), _task("b", 3), _task("c", 2)], answer)
    assert rounds == [["a", "b", "c"], ["b", "c"], ["b"]]


def test_only_one_task_runs_at_a_time() -> None:
    """Threads here are places to wait in: nothing depends on how they are scheduled."""
    running: list[int] = []
    most: list[int] = []

    def task(ask: Ask) -> None:
        for _ in range(20):
            running.append(1)
            most.append(len(running))
            sum(range(2000))
            running.pop()
            ask("next", [{"number": 0}])

    run_in_lockstep([task] * 4, _add_one)
    assert max(most) == 1


def test_questions_are_answered_in_the_callers_thread() -> None:
    """What belongs to a thread, such as autograd's modes, is the caller's."""
    threads = set()

    def answer(questions: list[RequestGroup]) -> list[list[Any]]:
        threads.add(threading.current_thread())
        return _add_one(questions)

    run_in_lockstep([_task("a", 2)] * 2, answer)
    assert threads == {threading.current_thread()}


def _failing(ask: Ask) -> str:
    ask("next", [{"of": "f", "number": 0}])
    raise ArithmeticError("the second step failed")


def test_the_error_of_a_task_is_the_callers() -> None:
    with pytest.raises(ArithmeticError, match="the second step failed"):
        run_in_lockstep([_task("a", 3), _failing, _task("b", 3)], _add_one)


@pytest.mark.parametrize("failing", ["task", "answer"])
def test_after_an_error_no_thread_waits_for_an_answer(failing: str) -> None:
    """A host lives on after a call that failed; its threads must not pile up."""

    def refuse(questions: list[RequestGroup]) -> list[list[Any]]:
        raise ArithmeticError("no answer")

    before = threading.active_count()
    with pytest.raises(ArithmeticError):
        run_in_lockstep([_task("a", 3), _failing], _add_one if failing == "task" else refuse)
    assert threading.active_count() == before


def test_no_tasks_have_no_results() -> None:
    assert run_in_lockstep([], _add_one) == []
