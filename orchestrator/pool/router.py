"""The pool of hosts: in this process, or as Ray actors behind one router. Knows nothing of what it is asked.

Scorers are pooled in the same way. A request is a method name of :class:`orchestrator.hosts.host.Host` (or of
:class:`orchestrator.hosts.scorer.Scorer`) and its arguments. Which host gets it when is said by ``queue``. The router
asks again when a host dies: alone on a host, so that a request which kills hosts takes no other with it. A request that
keeps failing is set aside and reported, and the rest goes on.

Requests that carry equal merge keys and wait at the same time are handed to a host as one call. A shared call that
fails is asked again one by one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import PoolError, UserError
from orchestrator.pool.prometheus import router_teller, telling, work_teller
from orchestrator.pool.queue import PLACES, Expected, Placement, Seat, Waiting, linger_seconds

if TYPE_CHECKING:
    from orchestrator.hosts.scorer import ScorerSettings
    from orchestrator.hosts.settings import HostSettings

NAMESPACE = "bespoke"
MAX_ATTEMPTS = 3
ROUTER_SECONDS = 2.0
"""Before a lost router is asked again: while Ray starts it, it refuses everything at once."""

ROUTER_PATIENCE = 180.0
"""Seconds for which a lost router is asked again: the loss of its node is known to Ray only after missed heartbeats."""

CONNECT_SECONDS = 5.0

HOST_LOSSES = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)


HOPELESS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError)
"""Errors that follow from the request itself: asking again would give the same."""


class Request(NamedTuple):
    """A host method and its arguments.

    Attributes:
        method: Name of the method.
        arguments: Its keyword arguments.
        merge_key: Requests to one method with equal keys may be answered together, where the host has a method for
            that (:attr:`Host.TOGETHER`) and the pool allows it; None: alone.
    """

    method: str
    arguments: dict[str, Any]
    merge_key: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The answer to request ``index``: a value, or the error that it was set aside with."""

    index: int
    value: Any
    error: Exception | None


class Pool(ABC):
    """Hosts that answer requests."""

    @abstractmethod
    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """The outcomes of these requests, as they are done, in any order; a request is taken when there is room."""

    def call(self, method: str, **arguments: Any) -> Any:
        """The answer to one request.

        Raises:
            UserError: The request cannot be answered, by any host.
        """
        (outcome,) = self.map([Request(method, arguments)])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def gather(self, requests: Sequence[Request]) -> list[Any]:
        """The answers to these requests, in order.

        Raises:
            UserError: One of them cannot be answered.
        """
        values: list[Any] = [None] * len(requests)
        for outcome in self.map(requests):
            if outcome.error is not None:
                raise outcome.error
            values[outcome.index] = outcome.value
        return values


class LocalPool(Pool):
    """One host in this process, without Ray: notebooks and tests. Answers one by one, whatever the merge keys."""

    def __init__(self, settings: HostSettings | ScorerSettings):
        self.host = settings.worker()(settings)

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        for index, request in enumerate(requests):
            try:
                yield Outcome(index, getattr(self.host, request.method)(**request.arguments), None)
            except UserError as error:
                yield Outcome(index, None, error)


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How many hosts, and what each takes of the cluster.

    Attributes:
        hosts: Number of host actors.
        cpus, gpus: Resources of each; fractions share a device.
        request_timeout: Seconds after which a silent host is taken for hung and restarted; None never.
        merge: Most requests with equal merge keys that a host is given as one call; 1: none are ever merged, and every
            answer is that of its request alone, to the bit.
    """

    hosts: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    request_timeout: float | None = None
    merge: int = 1


@dataclass(eq=False)
class _HostSeat(Seat):
    """A host actor, and what it has done."""

    actor: Any = field(kw_only=True)
    answered: int = 0


class _Attempt(NamedTuple):
    """How asking a host once went.

    Attributes:
        value: The answer.
        error: It cannot be answered: asking again would give the same.
        failure: It was not answered this time.
        lost: The host was lost with it.
    """

    value: Any = None
    error: Exception | None = None
    failure: Exception | None = None
    lost: bool = False


class _Asked(NamedTuple):
    """One attempt at a request, until it is known how that went."""

    method: str
    arguments: dict[str, Any]
    attempt: asyncio.Future[_Attempt]


@dataclass
class RouterStatistics:
    """What the router has seen.

    Attributes:
        answered: Calls that a host answered; a shared one counts once.
        shared_calls, shared_requests: Those of them that answered several requests, and how many these were.
        retried, set_aside: Requests that were asked again, and that were given up.
        per_host: Calls answered by each host.
    """

    answered: int = 0
    shared_calls: int = 0
    shared_requests: int = 0
    retried: int = 0
    set_aside: int = 0
    per_host: list[int] = field(default_factory=list)


class Router:
    """Owns the host actors and the queue. Runs as one asyncio actor, so its state needs no lock."""

    def __init__(self, host: HostSettings | ScorerSettings, pool: PoolSettings, name: str = "pool"):
        self.pool = pool
        self.worker: Any = host.worker()
        actor_class = ray.remote(telling(self.worker, partial(work_teller, name)))
        self.options = {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            "max_restarts": -1,
            # The router asks again itself: it may choose another host.
            "max_task_retries": 0,
            "runtime_env": {"env_vars": thread_limits(host.threads)},
        }
        self.make = lambda: actor_class.options(**self.options).remote(host)  # type: ignore[attr-defined]
        self.seats = [_HostSeat(actor=self.make(), up=False) for _ in range(pool.hosts)]
        self.opened = False
        self.waiting: Waiting[_HostSeat, _Asked] = Waiting(self.seats, pool.merge)
        self.tasks: set[asyncio.Task[None]] = set()
        self.statistics = RouterStatistics()

    def open(self) -> None:
        """Give hosts work as they come up. At the first request, since there is no running loop before it."""
        if not self.opened:
            self.opened = True
            for seat in self.seats:
                self._begin(self._bring_up(seat, lost=False))

    async def request(
        self, method: str, arguments: dict[str, Any], merge_key: str | None = None
    ) -> tuple[Any, Exception | None]:
        """The answer of whichever host is free, or the error the request is set aside with."""
        self.open()
        mergeable = merge_key is not None and self.pool.merge > 1 and method in self.worker.TOGETHER
        attempt = await self._attempt(method, arguments, key=(method, merge_key) if mergeable else None)
        for _ in range(MAX_ATTEMPTS - 1):
            if attempt.failure is None:
                break
            self.statistics.retried += 1
            attempt = await self._attempt(method, arguments, alone=attempt.lost)
        if attempt.failure is None and not isinstance(attempt.error, PoolError):
            return attempt.value, attempt.error
        self.statistics.set_aside += 1
        return None, attempt.error or PoolError(
            f"{method}({_brief(arguments)}) failed {MAX_ATTEMPTS} times and is set aside; the last time: "
            f"{type(attempt.failure).__name__}: {attempt.failure}"
        )

    async def _attempt(
        self, method: str, arguments: dict[str, Any], *, key: tuple[str, str | None] | None = None, alone: bool = False
    ) -> _Attempt:
        """Wait for a host and ask it once; ``alone``: a host that has nothing else to do, and gets nothing else."""
        asked = _Asked(method, arguments, asyncio.get_running_loop().create_future())
        self.waiting.add(asked, key, alone=alone)
        self._place()
        return await asked.attempt

    def _place(self) -> None:
        """After whatever happened: those who can have a host now are asked of it."""
        for placement in self.waiting.placements():
            self._begin(self._serve(placement))

    async def _serve(self, placement: Placement[_HostSeat, _Asked]) -> None:
        """Ask a host, free its places, and tell everybody who waits for the answer."""
        attempts: Sequence[_Attempt | Exception]
        begin = time.monotonic()
        try:
            attempts = await self._ask_once(placement.seat, placement.items)
        except Exception as error:  # whatever it was, nobody may wait without end
            attempts = [error] * len(placement.items)
        for asked, attempt in zip(placement.items, attempts, strict=True):
            if asked.attempt.done():  # whoever asked has been cancelled
                continue
            if isinstance(attempt, Exception):
                asked.attempt.set_exception(attempt)
            else:
                asked.attempt.set_result(attempt)
        expected = self.waiting.leave(placement, keep=True)
        self._place()
        if expected is not None:
            seconds = linger_seconds(time.monotonic() - begin)
            asyncio.get_running_loop().call_later(seconds, self._give_up, placement.seat, expected)

    def _give_up(self, seat: _HostSeat, expected: Expected) -> None:
        self.waiting.give_up(seat, expected)
        self._place()

    async def _ask_once(self, seat: _HostSeat, group: Sequence[_Asked]) -> list[_Attempt]:
        """One call for these requests; the attempt of each.

        A shared call that is not answered tells nothing of any one request in it, whatever the error: all have failed.
        """
        method = group[0].method
        if len(group) == 1:
            return [await self._answer(seat, method, group[0].arguments)]
        calls = [asked.arguments for asked in group]
        attempt = await self._answer(seat, self.worker.TOGETHER[method], {"calls": calls})
        if attempt.error is None and attempt.failure is None:
            self.statistics.shared_calls += 1
            self.statistics.shared_requests += len(group)
            return [_Attempt(value) for value in attempt.value]
        return [attempt._replace(error=None, failure=attempt.failure or attempt.error)] * len(group)

    async def _answer(self, seat: _HostSeat, method: str, arguments: dict[str, Any]) -> _Attempt:
        """How asking this host goes."""
        try:
            value = await self._ask(seat, method, arguments)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, UserError):
                return _Attempt(error=cause)
            if isinstance(cause, HOPELESS):
                text = f"{method}({_brief(arguments)}) failed: {type(cause).__name__}: {cause}"
                return _Attempt(error=PoolError(text))
            return _Attempt(failure=cause)
        except (TimeoutError, *HOST_LOSSES, GetTimeoutError) as error:
            self._lose(seat)
            return _Attempt(failure=error, lost=True)
        self.statistics.answered += 1
        seat.answered += 1
        return _Attempt(value)

    def _lose(self, seat: _HostSeat) -> None:
        """Give a lost host no work until it is up again: while Ray restarts it, it refuses everything at once."""
        if seat.up:
            seat.up = False
            self._begin(self._bring_up(seat, lost=True))

    async def _bring_up(self, seat: _HostSeat, *, lost: bool) -> None:
        """Wait until a host answers, however long it takes to be scheduled and to load its model; then give it work.

        One that cannot be made at all is given work, too: the request tells why, and is asked again of another.
        """
        try:
            await seat.actor.process_id.options(max_task_retries=-1).remote()
        except Exception:  # whatever it was, the next request meets it again
            if lost:
                seat.actor = self.make()
        seat.up = True
        self._place()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)  # the loop keeps no reference of its own
        task.add_done_callback(self.tasks.discard)

    async def _ask(self, seat: _HostSeat, method: str, arguments: dict[str, Any]) -> Any:
        reference = getattr(seat.actor, method).remote(**arguments)
        try:
            return await asyncio.wait_for(_as_coroutine(reference), self.pool.request_timeout)
        except TimeoutError:
            # Hung: nothing else will end it. Killing without no_restart lets Ray bring up a fresh one.
            ray.kill(seat.actor, no_restart=False)
            raise

    def now(self) -> dict[str, int]:
        """What is waiting and running at this moment."""
        return {
            "waiting": len(self.waiting),
            "in_flight": sum(seat.in_flight for seat in self.seats),
            "hosts_up": sum(seat.up for seat in self.seats),
        }

    async def stats(self) -> dict[str, Any]:
        self.statistics.per_host = [seat.answered for seat in self.seats]
        return asdict(self.statistics)


async def _as_coroutine(reference: Any) -> Any:
    return await reference


class _Pending(NamedTuple):
    """A request that the router has not answered yet.

    Attributes:
        losses: How often it was lost with the router, or refused since the router was away.
        since: When it first was, in seconds of the monotonic clock.
    """

    number: int
    request: Request
    losses: int = 0
    since: float = 0.0


class RayPool(Pool):
    """The pool as trials and the driver see it: a handle on the router."""

    def __init__(self, router: Any, hosts: int):
        self.router = router
        self.window = hosts * PLACES

    @classmethod
    def start(cls, name: str, host: HostSettings | ScorerSettings, pool: PoolSettings) -> RayPool:
        """Start the router and its hosts, or find those of this name that are up already."""
        router = (
            ray.remote(telling(Router, partial(router_teller, name)))
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                # With the driver, whose loss ends the work anyway: on another node it would be one more thing to lose.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
                runtime_env={"env_vars": thread_limits(1)},
            )
            .remote(host, pool, name)
        )
        return cls(router, pool.hosts)

    @classmethod
    def attach(cls, name: str, hosts: int) -> RayPool:
        """The pool of this name, from another process of the same cluster."""
        return cls(ray.get_actor(name, namespace=NAMESPACE), hosts)

    def close(self) -> None:
        """End the router, and with it its hosts: what they took of the cluster is free again."""
        with suppress(Exception):  # a cluster that is gone has ended them
            ray.kill(self.router)

    def map(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        waiting = (_Pending(number, request) for number, request in enumerate(requests))
        again: deque[_Pending] = deque()
        pending: dict[Any, _Pending] = {}
        while True:
            while len(pending) < self.window and (item := again.popleft() if again else next(waiting, None)):
                pending[self.router.request.remote(*item.request)] = item
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(done)
            try:
                value, error = ray.get(done)
            except HOST_LOSSES as lost:
                # The router itself. Ray starts it again once the loss is noticed; until then every call is refused.
                again.append(_lost_again(item, lost))
                time.sleep(ROUTER_SECONDS)
                continue
            yield Outcome(item.number, value, error)

    def statistics(self) -> dict[str, Any]:
        """What the router has seen: the fields of :class:`RouterStatistics`."""
        return ray.get(self.router.stats.remote())


def _lost_again(item: _Pending, lost: Exception) -> _Pending:
    """This request, to be asked once more.

    Raises:
        PoolError: It was lost too often, and for too long.
    """
    now = time.monotonic()
    item = item._replace(losses=item.losses + 1, since=item.since if item.losses else now)
    if item.losses >= MAX_ATTEMPTS and now - item.since > ROUTER_PATIENCE:
        raise PoolError(
            f"the pool's router was lost {item.losses} times in {now - item.since:.0f} s; the last time: {lost}"
        ) from lost
    return item


def thread_limits(threads: int) -> dict[str, str]:
    """Before any import: OpenMP reads its limit when it loads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _brief(arguments: dict[str, Any]) -> str:
    """The small arguments of a request, for an error message."""
    small = {key: value for key, value in arguments.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{key}={value}" for key, value in small.items())


def connect(address: str | None, cpus: int) -> None:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: 'auto' or host:port; None starts a local one.
        cpus: CPUs of a local one.

    Raises:
        PoolError: There is no cluster at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # before init, which has notices of its own
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # 'local', or Ray would join whatever cluster was last started on this machine.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
        return
    try:
        _check_listens(address)
        ray.init(address=address, **common)
    except (OSError, RuntimeError, ValueError) as error:
        raise PoolError(
            f"no Ray cluster at {address!r}: {error}; start one with `ray up ray_cluster.yaml`, or leave out --address "
            f"for a local Ray"
        ) from error


def _check_listens(address: str) -> None:
    """Fail within seconds where nobody listens: Ray itself tries for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass


def check_fits(
    hosts: int,
    host_cpus: float,
    host_gpus: float,
    other_cpus: float,
    other_gpus: float = 0.0,
    others: str = "one trial",
    keys: str = "resources.trial_cpus",
) -> None:
    """Refuse resources with which the work would wait for itself.

    Args:
        hosts: Number of hosts.
        host_cpus, host_gpus: What each takes.
        other_cpus, other_gpus: What must run beside all of them.
        others: What that is.
        keys: What to change to make it less.

    Raises:
        PoolError: Naming what is asked, what there is, and what to change.
    """
    there = ray.cluster_resources()
    for unit, of_host, of_others in (("CPU", host_cpus, other_cpus), ("GPU", host_gpus, other_gpus)):
        need, have = hosts * of_host + of_others, there.get(unit, 0.0)
        if need <= have + 1e-9:
            continue
        beside = f" and {others} of {of_others:g} {unit}" if of_others else ""
        remedy = f"resources.hosts or resources.host_cpus or {keys}"
        if unit == "GPU":
            remedy = "resources.hosts or resources.host_gpus, or set resources.device to cpu"
        raise PoolError(
            f"{hosts} hosts of {of_host:g} {unit}{beside} need {need:g} {unit}s, but the cluster has {have:g}; "
            f"lower {remedy}"
        )
