"""A trial asks its runner for news until the point is done, and tells Tune: without Ray, by runners that are played."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from orchestrator.errors import UserError
from sweeps.points.trial import follow

News = tuple[list[dict[str, float]], bool]
Answer = Callable[[dict[str, Any], float], News]


@pytest.fixture(autouse=True)
def answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a played runner gives is the answer itself."""
    monkeypatch.setattr(ray, "get", lambda answer: answer())


def played(answer: Answer) -> Any:
    """A handle of a runner that answers so."""

    def options(**given: Any) -> Any:
        assert given == {"max_task_retries": -1}, "a runner that is lost is asked again once Ray has started it"
        return SimpleNamespace(remote=lambda point, after: lambda: answer(point, after))

    return SimpleNamespace(follow=SimpleNamespace(options=options))


def test_every_validation_is_reported_once_and_the_next_is_asked_for() -> None:
    """Several at once where the runner was faster, none where it had nothing to tell in time."""
    script: list[News] = [
        ([{"iteration": 0.0}], False),
        ([], False),
        ([{"iteration": 10.0}, {"iteration": 20.0}], False),
        ([], True),
    ]
    asked: list[float] = []

    def answer(point: dict[str, Any], after: float) -> News:
        assert point == {"key": 1}
        asked.append(after)
        return script[len(asked) - 1]

    reported: list[float] = []
    follow({"key": 1}, [played(answer)], lambda values: reported.append(values["iteration"]))
    assert asked == [-1, 0, 0, 20]
    assert reported == [0, 10, 20]


def test_what_a_point_fails_with_is_what_tune_is_told() -> None:
    """Not Ray's wrapping of it: its sentence ends in the report."""

    def answer(point: dict[str, Any], after: float) -> News:
        raise RayTaskError("follow", "the traceback there", UserError("no pairs"))

    with pytest.raises(UserError, match=r"^no pairs$"):
        follow({}, [played(answer)], lambda values: None)


def test_a_point_goes_to_one_runner_whoever_asks_and_all_of_them_have_some() -> None:
    """A trial that Tune starts again must find its point where it is running."""
    asked: list[tuple[int, int]] = []

    def runner(number: int) -> Any:
        def answer(point: dict[str, Any], after: float) -> News:
            asked.append((point["key"], number))
            return [], True

        return played(answer)

    runners = [runner(number) for number in range(3)]
    for key in range(50):
        follow({"key": key, "nfe": 8}, runners, lambda values: None)
        follow({"nfe": 8, "key": key}, runners, lambda values: None)
    assert len(set(asked)) == 50
    assert {number for _, number in asked} == {0, 1, 2}
