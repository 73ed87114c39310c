"""A point runner executes points for trials that may ask late, ask twice, or never ask again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import UserError
from orchestrator.pairs import PairSpec
from orchestrator.results.store import ResultStore
from orchestrator.storage import Storage
from sweeps.point import AnyPoint, point_from_dict
from sweeps.points import concurrent as points
from sweeps.points.concurrent import Points
from sweeps.space import fixed_points

Work = Callable[[Callable[[float], None]], None]
"""Replaces the work of a point; the argument is a callback that reports an iteration."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> Callable[..., Points]:
    """Makes a runner whose points do the given work."""
    monkeypatch.setattr(points, "STOP_POLL_SECONDS", 0.01)

    def start(work: Work, *, wait_for_tune: bool = False) -> Points:
        def run_trial(point: AnyPoint, context: Any, report: Callable[[dict[str, float]], None]) -> None:
            work(lambda iteration: report({"iteration": iteration}))

        monkeypatch.setattr(points, "run_trial", run_trial)
        return Points(SimpleNamespace(storage=storage.root), wait_for_tune)  # type: ignore[arg-type]

    return start


@pytest.fixture
def point(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> dict[str, Any]:
    """The content of a point, as Tune passes it to a trial."""
    return fixed_points(config, specs)[0].to_dict()


async def follow(runner: Points, point: dict[str, Any], after: float = -1.0) -> list[float]:
    """Follow a point to its end as a trial does; return the iterations it reports."""
    iterations, ended = [], False
    while not ended:
        validations, ended = await runner.follow(point, after)
        iterations += [values["iteration"] for values in validations]
        after = iterations[-1] if iterations else after
    return iterations


def test_every_validation_is_reported_once_and_in_order(started: Callable[..., Points], point: dict[str, Any]) -> None:
    """The first is the validation of the start, at iteration 0."""

    def work(report: Callable[[float], None]) -> None:
        for iteration in range(0, 50, 10):
            report(iteration)
            time.sleep(0.002)

    assert asyncio.run(follow(started(work), point)) == [0, 10, 20, 30, 40]


def test_a_restarted_trial_follows_its_point_from_the_first_validation(
    started: Callable[..., Points], point: dict[str, Any]
) -> None:
    """Tune restarts a killed trial while the point itself keeps running."""
    starts, gate = [], threading.Event()

    def work(report: Callable[[float], None]) -> None:
        starts.append(1)
        report(0)
        gate.wait(20)
        report(10)

    async def scenario() -> list[float]:
        runner = started(work)
        assert await runner.follow(point, -1.0) == ([{"iteration": 0}], False)
        gate.set()
        return await follow(runner, point)

    assert asyncio.run(scenario()) == [0, 10]
    assert starts == [1]


def test_in_lockstep_a_point_waits_for_the_decision_of_tune(
    started: Callable[..., Points], point: dict[str, Any]
) -> None:
    """A request for validations after an iteration means that Tune has let the trial continue from there."""
    done: list[int] = []

    def work(report: Callable[[float], None]) -> None:
        for iteration in (0, 10, 20):
            report(iteration)
            done.append(iteration)

    async def scenario() -> None:
        runner = started(work, wait_for_tune=True)
        assert await runner.follow(point, -1) == ([{"iteration": 0}], False)
        await asyncio.sleep(0.1)
        assert done == []
        assert await runner.follow(point, 0) == ([{"iteration": 10}], False)
        await asyncio.sleep(0.1)
        assert done == [0]
        assert await follow(runner, point, 10) == [20]

    asyncio.run(scenario())
    assert done == [0, 10, 20]


def test_in_lockstep_a_point_that_tune_has_stopped_ends(
    started: Callable[..., Points], point: dict[str, Any], storage: Storage
) -> None:
    """Its trial no longer asks for validations: the mark in the point's result store releases it."""
    ended = threading.Event()

    def work(report: Callable[[float], None]) -> None:
        report(0)
        ended.set()

    async def scenario() -> list[float]:
        runner = started(work, wait_for_tune=True)
        await runner.follow(point, -1)
        assert not await asyncio.to_thread(ended.wait, 0.1)
        ResultStore(storage, point_from_dict(point).key).mark_stopped()
        assert await asyncio.to_thread(ended.wait, 20)
        return await follow(runner, point)

    assert asyncio.run(scenario()) == [0]


def test_a_failed_point_is_retried_at_the_next_request(started: Callable[..., Points], point: dict[str, Any]) -> None:
    """The trial receives the error itself; Tune decides on the number of retries."""
    attempts = []

    def work(report: Callable[[float], None]) -> None:
        attempts.append(1)
        report(0)
        if len(attempts) == 1:
            raise UserError("no pairs")

    async def scenario() -> list[float]:
        runner = started(work)
        with pytest.raises(UserError, match="no pairs"):
            await follow(runner, point)
        return await follow(runner, point)

    assert asyncio.run(scenario()) == [0]


def test_a_request_for_news_returns_empty_after_a_time_limit(
    started: Callable[..., Points], point: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit, a request would not notice that its trial is gone."""
    monkeypatch.setattr(points, "ANSWER_SECONDS", 0.01)
    gate = threading.Event()

    def work(report: Callable[[float], None]) -> None:
        gate.wait(20)
        report(0)

    async def scenario() -> list[float]:
        runner = started(work)
        assert await runner.follow(point, -1) == ([], False)
        gate.set()
        return await follow(runner, point)

    assert asyncio.run(scenario()) == [0]


def test_the_process_of_a_trial_imports_neither_torch_nor_mlflow() -> None:
    """There are many trials; half a gigabyte for each would exhaust a node."""
    code = (
        "import sys, ray.tune, sweeps.points.trial, sweeps.points.runner\n"
        "print(sorted({'torch', 'mlflow', 'orchestrator'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_runner_that_closes_answers_every_waiting_trial(
    started: Callable[..., Points], point: dict[str, Any]
) -> None:
    """Nobody waits for a reply any more when its actor is killed, which Ray would report as a failure."""
    gate = threading.Event()

    def work(report: Callable[[float], None]) -> None:
        report(0)
        gate.wait(20)

    async def scenario() -> None:
        runner = started(work)
        await runner.follow(point, -1)
        waiting = asyncio.create_task(runner.follow(point, 0))
        await asyncio.sleep(0.05)
        await runner.close()
        assert await waiting == ([], True)
        assert await runner.follow(point, 0) == ([], True)
        gate.set()
        while not next(iter(runner.running.values())).ended:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # the point's thread announces its end to this loop

    asyncio.run(scenario())
