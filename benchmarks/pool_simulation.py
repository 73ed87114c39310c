"""A discrete-event simulation of trials, the router, hosts and MLflow, without Ray and in simulated time.

Trials send the same requests as in sweeps/points/execute.py (validate the start; advance and validate, log, and so on;
score the test pairs at the end). Scheduling is the router's own, orchestrator/pool/queue.py.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from orchestrator.pool.queue import Assignment, HostState, RequestQueue, Reservation, reservation_seconds


@dataclass(frozen=True)
class Times:
    """Durations in seconds.

    Attributes:
        advance: Time of a host for the iterations between two validations of one trial.
        batched: The same for 2, 4 and 8 batched trials, as multiples of ``advance``.
        score: Time of a host for one validation.
        router: Time of the router per request, both ways.
        log: Time of MLflow for one batch of metrics.
        own: Time of a trial between an answer and its next request.
        wire: Time of a request in Ray, both ways, during which the router is not busy.
    """

    advance: float
    score: float
    batched: tuple[float, float, float] = (1.0, 1.0, 1.0)
    router: float = 0.0
    log: float = 0.0
    own: float = 0.0
    wire: float = 0.0

    def advance_batched(self, count: int) -> float:
        """Seconds to advance ``count`` batched trials and validate each; interpolated linearly."""
        return self.advance * float(np.interp(count, [1, 2, 4, 8], [1.0, *self.batched])) + count * self.score


@dataclass(frozen=True)
class Load:
    """The trials to simulate.

    Attributes:
        trials: Number of trials; all begin at once.
        validations: Validations per trial, after that of its start.
        keys: Number of different batch keys; trials with equal keys may be batched.
    """

    trials: int
    validations: int
    keys: int


@dataclass
class Outcome:
    """Measurements of a real or simulated run.

    Attributes:
        seconds: Time from the first request to the last answer.
        host_busy: Share of the hosts' time in which they worked.
        latency: Mean seconds from a request to its answer.
        logs_per_second: Rate of MLflow.
        batched_share: Share of the advances that were answered in batched calls.
        router_busy, log_busy: Share of the time in which the router and MLflow worked.
    """

    seconds: float
    host_busy: float
    latency: float
    logs_per_second: float
    batched_share: float
    router_busy: float = float("nan")
    log_busy: float = float("nan")


Step = tuple[str, str | None]
Then = Callable[[], None]


def steps(workload: Load, key: str) -> Generator[Step, None, None]:
    """The steps of a trial, in order: ('advance' | 'score' | 'log' | 'own', batch key)."""
    for validation in range(workload.validations + 1):
        yield ("advance", key) if validation else ("score", None)
        yield "log", None
        yield "own", None
    yield "score", None
    yield "score", None


class Clock:
    """Runs events in order of time; events at the same time in order of arrival."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Then]] = []
        self._number = itertools.count()

    def after(self, seconds: float, then: Then) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), then))

    def run(self) -> None:
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            then()


class Server:
    """Works on one task at a time, in order of arrival."""

    def __init__(self, clock: Clock):
        self.clock, self.free, self.busy = clock, 0.0, 0.0

    def take(self, seconds: float, then: Then) -> None:
        begin = max(self.clock.now, self.free)
        self.free = begin + seconds
        self.busy += seconds
        self.clock.after(self.free - self.clock.now, then)


class QueuedRequest(NamedTuple):
    """A request queued at the router."""

    kind: str
    then: Then


@dataclass(eq=False)
class SimulatedHost(HostState):
    """A host whose work takes simulated time."""

    server: Server = field(kw_only=True)


@dataclass
class Simulation:
    """One simulated run."""

    workload: Load
    times: Times
    hosts: int
    max_batch: int
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.router, self.mlflow = Server(self.clock), Server(self.clock)
        self.loads = [SimulatedHost(server=Server(self.clock)) for _ in range(self.hosts)]
        self.queue: RequestQueue[SimulatedHost, QueuedRequest] = RequestQueue(self.loads, self.max_batch)
        self.logs = self.advances = self.batched = 0
        self.latencies: list[float] = []

    def run(self) -> Outcome:
        for number in range(self.workload.trials):
            self._next(steps(self.workload, f"key {number % self.workload.keys}"))
        self.clock.run()
        seconds = self.clock.now
        return Outcome(
            seconds=seconds,
            host_busy=sum(host.server.busy for host in self.loads) / (self.hosts * seconds),
            latency=float(np.mean(self.latencies)),
            logs_per_second=self.logs / seconds,
            batched_share=self.batched / max(1, self.advances),
            router_busy=self.router.busy / seconds,
            log_busy=self.mlflow.busy / seconds,
        )

    def _next(self, trial: Generator[Step, None, None]) -> None:
        step = next(trial, None)
        if step is None:
            return
        kind, key = step
        go_on = lambda: self._next(trial)  # noqa: E731
        if kind == "log":
            self.logs += 1
            self.mlflow.take(self.times.log, go_on)
        elif kind == "own":
            self.clock.after(self.times.own, go_on)
        else:
            self._request(kind, key if self.max_batch > 1 else None, go_on)

    def _request(self, kind: str, key: str | None, then: Then) -> None:
        begin = self.clock.now

        def answered() -> None:
            self.latencies.append(self.clock.now - begin)
            then()

        def back() -> None:
            self.clock.after(self.times.wire / 2, answered)

        def arrived() -> None:
            self.queue.add(QueuedRequest(kind, back), key)
            self._dispatch()

        self.clock.after(self.times.wire / 2, lambda: self.router.take(self.times.router / 2, arrived))

    def _dispatch(self) -> None:
        for assignment in self.queue.assignments():
            self._run(assignment)

    def _run(self, assignment: Assignment[SimulatedHost, QueuedRequest]) -> None:
        group = assignment.items
        advance_steps = group[0].kind == "advance"
        if advance_steps:
            self.advances += len(group)
            self.batched += len(group) if len(group) > 1 else 0

        seconds = self.times.advance_batched(len(group)) if advance_steps else self.times.score

        def done() -> None:
            self.router.take(self.times.router / 2 * len(group), free)

        def free() -> None:
            reservation = self.queue.release(assignment, reserve=True)
            self._dispatch()
            if reservation is not None:
                self.clock.after(reservation_seconds(seconds), lambda: self._cancel(assignment.host, reservation))
            for request in group:
                request.then()

        assignment.host.server.take(seconds, done)

    def _cancel(self, host: SimulatedHost, reservation: Reservation) -> None:
        self.queue.cancel(host, reservation)
        self._dispatch()


def bottleneck(outcome: Outcome) -> str:
    """The part that is busy for the largest share of the time."""
    busy = {"the hosts": outcome.host_busy, "the router": outcome.router_busy, "MLflow": outcome.log_busy}
    name = max(busy, key=lambda key: busy[key])
    return f"{name}, busy {100 * busy[name]:.0f} % of the time"
