"""The pool of hosts: in this process, or as Ray actors behind one router. Knows nothing of what it is asked.

Scorers are pooled in the same way. A request is a method name of :class:`orchestrator.host.Host` (or of
:class:`orchestrator.scorer.Scorer`) and its arguments. The router keeps at most two requests
at each host (one running, one waiting, so that the device never idles), gives work to the least loaded, and asks
again when a host dies: alone on a host, so that a request which kills hosts takes no other with it. A request that
keeps failing is set aside and reported, and the rest goes on.

Requests that carry equal merge keys and wait at the same time are handed to a host as one call. They take a host
that is idle, and all of it: while every host is busy they gather. A shared call that fails is asked again one by one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
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

from orchestrator.errors import PoolError, UserError

if TYPE_CHECKING:
    from orchestrator.host_interface import HostSettings
    from orchestrator.scorer import ScorerSettings

NAMESPACE = "bespoke"
IN_FLIGHT_PER_HOST = 2
MAX_ATTEMPTS = 3
PATIENCE = 50
"""Requests a host may be given while one that can be merged waits for an idle host; then it takes any place."""

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


@dataclass
class _Seat:
    """A host actor and what it is doing."""

    actor: Any
    in_flight: int = 0
    answered: int = 0
    up: bool = True


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


@dataclass(eq=False)
class _Gathered:
    """A request that waits for a host in company.

    Attributes:
        arguments: The arguments.
        arrival: Places that had been given away when it came.
        attempt: How the first attempt went, for it and for those it shared the call with.
        taken: Whether a host has been found, by this request or by another that took it along.
    """

    arguments: dict[str, Any]
    arrival: int
    attempt: asyncio.Future[_Attempt]
    taken: bool = False


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

    def __init__(self, host: HostSettings | ScorerSettings, pool: PoolSettings):
        self.pool = pool
        self.worker: Any = host.worker()
        actor_class = ray.remote(self.worker)
        self.options = {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            "max_restarts": -1,
            # The router asks again itself: it may choose another host.
            "max_task_retries": 0,
            "runtime_env": {"env_vars": _thread_limits(host.threads)},
        }
        self.make = lambda: actor_class.options(**self.options).remote(host)  # type: ignore[attr-defined]
        self.seats = [_Seat(self.make()) for _ in range(pool.hosts)]
        self.free = asyncio.Condition()
        self.waiting_alone = 0
        self.given = 0
        self.gathered: dict[tuple[str, str], list[_Gathered]] = {}
        self.revivals: set[asyncio.Task[None]] = set()
        self.statistics = RouterStatistics()

    async def request(
        self, method: str, arguments: dict[str, Any], merge_key: str | None = None
    ) -> tuple[Any, Exception | None]:
        """The answer of whichever host is free, or the error the request is set aside with."""
        if merge_key is not None and self.pool.merge > 1 and method in self.worker.TOGETHER:
            attempt = await self._in_company(method, arguments, merge_key)
        else:
            attempt = await self._by_itself(method, arguments, alone=False)
        for _ in range(MAX_ATTEMPTS - 1):
            if attempt.failure is None:
                break
            self.statistics.retried += 1
            attempt = await self._by_itself(method, arguments, alone=attempt.lost)
        if attempt.failure is None and not isinstance(attempt.error, PoolError):
            return attempt.value, attempt.error
        self.statistics.set_aside += 1
        return None, attempt.error or PoolError(
            f"{method}({_brief(arguments)}) failed {MAX_ATTEMPTS} times and is set aside; the last time: "
            f"{type(attempt.failure).__name__}: {attempt.failure}"
        )

    async def _by_itself(self, method: str, arguments: dict[str, Any], *, alone: bool) -> _Attempt:
        """One attempt at a request that shares no call; ``alone``: nor a host."""
        seat, taken = await self._seat(alone)
        return await self._attempt(seat, taken, method, arguments)

    async def _attempt(self, seat: _Seat, taken: int, method: str, arguments: dict[str, Any]) -> _Attempt:
        """Ask once, and give back the places that were taken of the host."""
        try:
            value = await self._ask(seat, method, arguments)
            self.statistics.answered += 1
            seat.answered += 1
            return _Attempt(value)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, UserError):
                return _Attempt(error=cause)
            if isinstance(cause, HOPELESS):
                text = f"{method}({_brief(arguments)}) failed: {type(cause).__name__}: {cause}"
                return _Attempt(error=PoolError(text))
            return _Attempt(failure=cause)
        except (TimeoutError, *HOST_LOSSES, GetTimeoutError) as error:
            self._revive(seat)
            return _Attempt(failure=error, lost=True)
        finally:
            async with self.free:
                seat.in_flight -= taken
                self.free.notify_all()

    # ---- requests that may be answered together ---------------------------------------------------------------

    async def _in_company(self, method: str, arguments: dict[str, Any], merge_key: str) -> _Attempt:
        """The first attempt at a request, in one call with those of its key that wait when a host becomes idle.

        The longest waiting one takes the host, and the next ones along.
        """
        waiting = self.gathered.setdefault((method, merge_key), [])
        mine = _Gathered(arguments, self.given, asyncio.get_running_loop().create_future())
        waiting.append(mine)
        found = await self._idle_seat(mine, waiting)
        if found is not None:
            seat, taken, group = found
            try:
                attempts = await self._shared(seat, taken, method, group)
                for gathered, attempt in zip(group, attempts, strict=True):
                    gathered.attempt.set_result(attempt)
            except Exception as error:  # whatever it was, the others must not wait without end
                for gathered in group:
                    gathered.attempt.set_exception(error)
        return await mine.attempt

    async def _shared(self, seat: _Seat, taken: int, method: str, group: Sequence[_Gathered]) -> list[_Attempt]:
        """One call for these requests; the attempt of each.

        A shared call that is not answered tells nothing of any one request in it, whatever the error: all have failed.
        """
        if len(group) == 1:
            return [await self._attempt(seat, taken, method, group[0].arguments)]
        calls = [gathered.arguments for gathered in group]
        attempt = await self._attempt(seat, taken, self.worker.TOGETHER[method], {"calls": calls})
        if attempt.error is None and attempt.failure is None:
            self.statistics.shared_calls += 1
            self.statistics.shared_requests += len(group)
            return [_Attempt(value) for value in attempt.value]
        return [attempt._replace(error=None, failure=attempt.failure or attempt.error)] * len(group)

    async def _idle_seat(
        self, gathered: _Gathered, waiting: list[_Gathered]
    ) -> tuple[_Seat, int, list[_Gathered]] | None:
        """An idle host, with all of its places, and who goes there; None where another has taken this one along.

        All of it: a short request behind a shared call would wait for the whole of it, and elsewhere it need not.
        """

        def places() -> int:
            # A stream of other requests may never leave a host idle.
            return 1 if self.given - gathered.arrival > PATIENCE * len(self.seats) else IN_FLIGHT_PER_HOST

        async with self.free:
            await self.free.wait_for(
                lambda: gathered.taken or (gathered is waiting[0] and self._least_loaded(places()) is not None)
            )
            if gathered.taken:
                return None
            group = waiting[: self.pool.merge]
            del waiting[: len(group)]
            for one in group:
                one.taken = True
            self.free.notify_all()  # those that are left have another longest waiting one
            return *self._take(places()), group

    # ---- which host -------------------------------------------------------------------------------------------

    async def _seat(self, alone: bool) -> tuple[_Seat, int]:
        """The least loaded host that is up, and how many of its places are taken: one, or all of them."""
        places = IN_FLIGHT_PER_HOST if alone else 1
        async with self.free:
            self.waiting_alone += alone
            try:
                await self.free.wait_for(lambda: self._least_loaded(places, alone) is not None)
            finally:
                if alone:
                    self.waiting_alone -= 1
                    self.free.notify_all()
            return self._take(places)

    def _take(self, places: int) -> tuple[_Seat, int]:
        seat = self._least_loaded(places, alone=True)
        assert seat is not None
        seat.in_flight += places
        self.given += 1
        return seat, places

    def _least_loaded(self, places: int, alone: bool = False) -> _Seat | None:
        """The least loaded host that is up and has so many places free."""
        if self.waiting_alone and not alone:
            return None  # or a host would never run dry
        return min(
            (seat for seat in self.seats if seat.up and seat.in_flight + places <= IN_FLIGHT_PER_HOST),
            key=lambda seat: seat.in_flight,
            default=None,
        )

    def _revive(self, seat: _Seat) -> None:
        """Give a lost host no work until it is up again: while Ray restarts it, it refuses everything at once."""
        if not seat.up:
            return
        seat.up = False

        async def revive() -> None:
            try:
                await seat.actor.process_id.options(max_task_retries=-1).remote()
            except Exception:  # whatever it was, a seat that stays empty would be waited for without end
                seat.actor = self.make()
            async with self.free:
                seat.up = True
                self.free.notify_all()

        task = asyncio.create_task(revive())
        self.revivals.add(task)  # the loop keeps no reference of its own
        task.add_done_callback(self.revivals.discard)

    async def _ask(self, seat: _Seat, method: str, arguments: dict[str, Any]) -> Any:
        reference = getattr(seat.actor, method).remote(**arguments)
        try:
            return await asyncio.wait_for(_as_coroutine(reference), self.pool.request_timeout)
        except TimeoutError:
            # Hung: nothing else will end it. Killing without no_restart lets Ray bring up a fresh one.
            ray.kill(seat.actor, no_restart=False)
            raise

    async def stats(self) -> dict[str, Any]:
        self.statistics.per_host = [seat.answered for seat in self.seats]
        return asdict(self.statistics)


async def _as_coroutine(reference: Any) -> Any:
    return await reference


class RayPool(Pool):
    """The pool as trials and the driver see it: a handle on the router."""

    def __init__(self, router: Any, hosts: int):
        self.router = router
        self.window = hosts * IN_FLIGHT_PER_HOST

    @classmethod
    def start(cls, name: str, host: HostSettings | ScorerSettings, pool: PoolSettings) -> RayPool:
        """Start the router and its hosts, or find those of this name that are up already."""
        router = (
            ray.remote(Router)
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                runtime_env={"env_vars": _thread_limits(1)},
            )
            .remote(host, pool)
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
        waiting = iter(enumerate(requests))
        pending: dict[Any, int] = {}
        while True:
            while len(pending) < self.window and (item := next(waiting, None)) is not None:
                index, request = item
                pending[self.router.request.remote(*request)] = index
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            index = pending.pop(done)
            value, error = ray.get(done)
            yield Outcome(index, value, error)

    def statistics(self) -> dict[str, Any]:
        """What the router has seen: the fields of :class:`RouterStatistics`."""
        return ray.get(self.router.stats.remote())


def _thread_limits(threads: int) -> dict[str, str]:
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
