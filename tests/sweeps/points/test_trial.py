"""A trial asks its point runner for news until the point is done, and reports it to Tune. The runners are fakes."""

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
    """The futures of a fake runner are plain functions that return the answer."""
    monkeypatch.setattr(ray, "get", lambda answer: answer())


def fake_runner(answer: Answer) -> Any:
    """A handle of a runner whose ``follow`` returns ``answer(point, after)``."""

    def options(**settings: Any) -> Any:
        assert settings == {"max_task_retries": -1}, "requests to a lost runner are retried once Ray has restarted it"
        return SimpleNamespace(remote=lambda point, after: lambda: answer(point, after))

    return SimpleNamespace(follow=SimpleNamespace(options=options))


def test_every_validation_is_reported_once_before_the_next_request() -> None:
    """An answer may hold several validations, or none if there was no news in time."""
    script: list[News] = [
        ([{"iteration": 0.0}], False),
        ([], False),
        ([{"iteration": 10.0}, {"iteration": 20.0}], False),
        ([], True),
    ]
    requests: list[float] = []

    def answer(point: dict[str, Any], after: float) -> News:
        assert point == {"key": 1}
        requests.append(after)
        return script[len(requests) - 1]

    reported: list[float] = []
    follow({"key": 1}, [fake_runner(answer)], lambda values: reported.append(values["iteration"]))
    assert requests == [-1, 0, 0, 20]
    assert reported == [0, 10, 20]


def test_the_error_of_a_point_reaches_tune_unwrapped() -> None:
    """Tune gets the error itself, not Ray's wrapper, because its message appears in the report."""

    def answer(point: dict[str, Any], after: float) -> News:
        raise RayTaskError("follow", "the remote traceback", UserError("no pairs"))

    with pytest.raises(UserError, match=r"^no pairs$"):
        follow({}, [fake_runner(answer)], lambda values: None)


def test_each_point_has_one_runner_and_all_runners_have_points() -> None:
    """A restarted trial must reach the runner on which its point is running."""
    requests: list[tuple[int, int]] = []

    def runner(number: int) -> Any:
        def answer(point: dict[str, Any], after: float) -> News:
            requests.append((point["key"], number))
            return [], True

        return fake_runner(answer)

    runners = [runner(number) for number in range(3)]
    for key in range(50):
        follow({"key": key, "nfe": 8}, runners, lambda values: None)
        follow({"nfe": 8, "key": key}, runners, lambda values: None)
    assert len(set(requests)) == 50
    assert {number for _, number in requests} == {0, 1, 2}
