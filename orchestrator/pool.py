"""The pool of hosts: in this process, or as Ray actors behind one router. Knows nothing of what it is asked.

A request is a method name of :class:`orchestrator.host.Host` and its arguments. The router keeps at most two requests
at each host (one running, one waiting, so that the device never idles), gives work to the least loaded, and asks
again when a host dies: alone on a host, so that a request which kills hosts takes no other with it. A request that
keeps failing is set aside and reported, and the rest goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

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
from orchestrator.host import Host, HostSettings

NAMESPACE = "bespoke"
IN_FLIGHT_PER_HOST = 2
MAX_ATTEMPTS = 3
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
    """A host method and its arguments."""

    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The answer to request ``index``: a value, or the error that it was set aside with."""

    index: int
    value: Any
    error: Exception | None


class Pool(ABC):
    """Hosts that answer requests."""

    @abstractmethod
    def map(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """The outcomes of these requests, as they are done, in any order."""

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
    """One host in this process, without Ray: notebooks and tests."""

    def __init__(self, settings: HostSettings):
        self.host = Host(settings)

    def map(self, requests: Sequence[Request]) -> Iterator[Outcome]:
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
    """

    hosts: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    request_timeout: float | None = None


@dataclass
class _Seat:
    """A host actor and what it is doing."""

    actor: Any
    in_flight: int = 0
    answered: int = 0
    up: bool = True


@dataclass
class RouterStatistics:
    """What the router has seen."""

    answered: int = 0
    retried: int = 0
    set_aside: int = 0
    per_host: list[int] = field(default_factory=list)


class Router:
    """Owns the host actors and the queue. Runs as one asyncio actor, so its state needs no lock."""

    def __init__(self, host: HostSettings, pool: PoolSettings):
        self.pool = pool
        actor_class = ray.remote(Host)
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
        self.revivals: set[asyncio.Task[None]] = set()
        self.statistics = RouterStatistics()

    async def request(self, method: str, arguments: dict[str, Any]) -> tuple[Any, Exception | None]:
        """The answer of whichever host is free, or the error the request is set aside with."""
        failure: Exception | None = None
        alone = False
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                self.statistics.retried += 1
            seat, taken = await self._seat(alone)
            try:
                value = await self._ask(seat, method, arguments)
                self.statistics.answered += 1
                seat.answered += 1
                return value, None
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if isinstance(cause, UserError):
                    return None, cause
                if isinstance(cause, HOPELESS):
                    self.statistics.set_aside += 1
                    return None, PoolError(f"{method}({_brief(arguments)}) failed: {type(cause).__name__}: {cause}")
                failure = cause
            except (TimeoutError, *HOST_LOSSES, GetTimeoutError) as error:
                failure, alone = error, True
                self._revive(seat)
            finally:
                async with self.free:
                    seat.in_flight -= taken
                    self.free.notify_all()
        self.statistics.set_aside += 1
        return None, PoolError(
            f"{method}({_brief(arguments)}) failed {MAX_ATTEMPTS} times and is set aside; the last time: "
            f"{type(failure).__name__}: {failure}"
        )

    async def _seat(self, alone: bool) -> tuple[_Seat, int]:
        """The least loaded host that is up, and how many of its places are taken: one, or all of them."""
        async with self.free:
            self.waiting_alone += alone
            try:
                await self.free.wait_for(lambda: self._least_loaded(alone) is not None)
            finally:
                if alone:
                    self.waiting_alone -= 1
                    self.free.notify_all()
            seat = self._least_loaded(alone)
            assert seat is not None
            taken = IN_FLIGHT_PER_HOST if alone else 1
            seat.in_flight += taken
            return seat, taken

    def _least_loaded(self, alone: bool) -> _Seat | None:
        if self.waiting_alone and not alone:
            return None  # or a host would never run dry
        limit = 1 if alone else IN_FLIGHT_PER_HOST
        return min(
            (seat for seat in self.seats if seat.up and seat.in_flight < limit),
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
    def start(cls, name: str, host: HostSettings, pool: PoolSettings) -> RayPool:
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

    def map(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        waiting = iter(enumerate(requests))
        pending: dict[Any, int] = {}
        while True:
            while len(pending) < self.window and (item := next(waiting, None)) is not None:
                index, request = item
                pending[self.router.request.remote(request.method, request.arguments)] = index
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            index = pending.pop(done)
            value, error = ray.get(done)
            yield Outcome(index, value, error)

    def statistics(self) -> dict[str, Any]:
        """Requests answered, retried and set aside, and answered per host."""
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


def check_fits(hosts: int, host_cpus: float, host_gpus: float, trial_cpus: float) -> None:
    """Refuse resources with which the sweep would wait for itself.

    Raises:
        PoolError: Naming what is asked, what there is, and what to change.
    """
    there = ray.cluster_resources()
    for unit, of_host, of_trial in (("CPU", host_cpus, trial_cpus), ("GPU", host_gpus, 0.0)):
        need, have = hosts * of_host + of_trial, there.get(unit, 0.0)
        if need <= have + 1e-9:
            continue
        trial = f" and one trial of {of_trial:g} {unit}" if of_trial else ""
        keys = "resources.hosts or resources.host_cpus or resources.trial_cpus"
        if unit == "GPU":
            keys = "resources.hosts or resources.host_gpus, or set resources.device to cpu"
        raise PoolError(
            f"{hosts} hosts of {of_host:g} {unit}{trial} need {need:g} {unit}s, but the cluster has {have:g}; "
            f"lower {keys}"
        )
