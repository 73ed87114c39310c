"""A runner takes points to their results for trials that may come late, come twice, or not come back."""

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
from sweeps.points import concurrent as points
from sweeps.points.concurrent import Points
from sweeps.space import Point, fixed_points

Work = Callable[[Callable[[float], None]], None]
"""What a point does instead of distilling: it is given what reports an iteration."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> Callable[..., Points]:
    """Makes a runner whose points do this work."""
    monkeypatch.setattr(points, "LOOK_SECONDS", 0.01)

    def start(work: Work, *, lockstep: bool = False) -> Points:
        def run_trial(point: Point, context: Any, report: Callable[[dict[str, float]], None]) -> None:
            work(lambda iteration: report({"iteration": iteration}))

        monkeypatch.setattr(points, "run_trial", run_trial)
        return Points(SimpleNamespace(storage=storage.root), lockstep)  # type: ignore[arg-type]

    return start


@pytest.fixture
def point(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> dict[str, Any]:
    """A point's content, as Tune gives it to a trial."""
    return fixed_points(config, specs)[0].to_dict()


async def follow(there: Points, point: dict[str, Any], after: float = -1.0) -> list[float]:
    """The iterations that a trial is told of, to the point's end."""
    told, ended = [], False
    while not ended:
        validations, ended = await there.follow(point, after)
        told += [values["iteration"] for values in validations]
        after = told[-1] if told else after
    return told


def test_every_validation_is_told_once_and_in_order(started: Callable[..., Points], point: dict[str, Any]) -> None:
    """The first one is the start's, at iteration 0."""

    def work(report: Callable[[float], None]) -> None:
        for iteration in range(0, 50, 10):
            report(iteration)
            time.sleep(0.002)

    assert asyncio.run(follow(started(work), point)) == [0, 10, 20, 30, 40]


def test_a_trial_that_comes_again_joins_in_from_the_first_validation(
    started: Callable[..., Points], point: dict[str, Any]
) -> None:
    """Tune starts a killed trial anew, while the point itself goes on."""
    begun, gate = [], threading.Event()

    def work(report: Callable[[float], None]) -> None:
        begun.append(1)
        report(0)
        gate.wait(20)
        report(10)

    async def scenario() -> list[float]:
        there = started(work)
        assert await there.follow(point, -1.0) == ([{"iteration": 0}], False)
        gate.set()
        return await follow(there, point)

    assert asyncio.run(scenario()) == [0, 10]
    assert begun == [1]


def test_in_lockstep_a_point_waits_until_tune_knows(started: Callable[..., Points], point: dict[str, Any]) -> None:
    """Asking for what comes after an iteration says that Tune has let the trial go on from there."""
    done: list[int] = []

    def work(report: Callable[[float], None]) -> None:
        for iteration in (0, 10, 20):
            report(iteration)
            done.append(iteration)

    async def scenario() -> None:
        there = started(work, lockstep=True)
        assert await there.follow(point, -1) == ([{"iteration": 0}], False)
        await asyncio.sleep(0.1)
        assert done == []
        assert await there.follow(point, 0) == ([{"iteration": 10}], False)
        await asyncio.sleep(0.1)
        assert done == [0]
        assert await follow(there, point, 10) == [20]

    asyncio.run(scenario())
    assert done == [0, 10, 20]


def test_in_lockstep_a_point_that_tune_has_stopped_comes_to_its_end(
    started: Callable[..., Points], point: dict[str, Any], storage: Storage
) -> None:
    """Nobody asks for it any more: the mark in its store is what lets it go."""
    ended = threading.Event()

    def work(report: Callable[[float], None]) -> None:
        report(0)
        ended.set()

    async def scenario() -> list[float]:
        there = started(work, lockstep=True)
        await there.follow(point, -1)
        assert not await asyncio.to_thread(ended.wait, 0.1)
        ResultStore(storage, Point.from_dict(point).key).mark_stopped()
        assert await asyncio.to_thread(ended.wait, 20)
        return await follow(there, point)

    assert asyncio.run(scenario()) == [0]


def test_a_point_that_fails_is_tried_again_when_it_is_asked_for_again(
    started: Callable[..., Points], point: dict[str, Any]
) -> None:
    """The trial is told of the error itself; Tune decides how often it tries."""
    attempts = []

    def work(report: Callable[[float], None]) -> None:
        attempts.append(1)
        report(0)
        if len(attempts) == 1:
            raise UserError("no pairs")

    async def scenario() -> list[float]:
        there = started(work)
        with pytest.raises(UserError, match="no pairs"):
            await follow(there, point)
        return await follow(there, point)

    assert asyncio.run(scenario()) == [0]


def test_a_point_that_takes_long_is_asked_for_again_and_again(
    started: Callable[..., Points], point: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that waited without end would never learn that its trial is gone."""
    monkeypatch.setattr(points, "ANSWER_SECONDS", 0.01)
    gate = threading.Event()

    def work(report: Callable[[float], None]) -> None:
        gate.wait(20)
        report(0)

    async def scenario() -> list[float]:
        there = started(work)
        assert await there.follow(point, -1) == ([], False)
        gate.set()
        return await follow(there, point)

    assert asyncio.run(scenario()) == [0]


def test_the_process_of_a_trial_imports_neither_torch_nor_mlflow() -> None:
    """There are many of them; half a gigabyte each would be the limit of a node."""
    code = (
        "import sys, ray.tune, sweeps.points.trial, sweeps.points.runner\n"
        "print(sorted({'torch', 'mlflow', 'orchestrator'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
