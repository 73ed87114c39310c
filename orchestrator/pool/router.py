"""The router: one asyncio actor that owns the host actors and the queue in front of them.

It serves hosts and scorers alike; what they are asked for does not matter here. ``queue`` decides which host gets which
request when. If a host dies, its requests are retried, each on a host of its own, so that a request that kills hosts
takes no other with it. A request that keeps failing is set aside and reported, and the rest goes on.

Requests with equal batch keys that are queued at the same time run on a host as one batched call. If a batched call
fails, its requests are retried one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from orchestrator.errors import CodeError, PoolError, UserError, describe, may_pass
from orchestrator.pool.prometheus import monitored, report_work
from orchestrator.pool.queue import Assignment, HostState, RequestQueue, Reservation, reservation_seconds
from orchestrator.pool.requests import ActorSettings, PoolSettings

MAX_ATTEMPTS = 3

HOST_LOSSES = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)


@dataclass(eq=False)
class _Host(HostState):
    """A host actor and its load.

    Attributes:
        actor: Its handle.
        answered: Calls it has answered.
        broken: Why it cannot be built; every request is answered with it.
    """

    actor: Any = field(kw_only=True)
    answered: int = 0
    broken: UserError | None = None


class _Reply(NamedTuple):
    """How one attempt at a request ended.

    Attributes:
        value: What the host returned.
        error: An error that a retry would not change.
        failure: An error after which the request is retried.
        host_lost: Whether the host was lost during the attempt.
    """

    value: Any = None
    error: Exception | None = None
    failure: Exception | None = None
    host_lost: bool = False


class _QueuedRequest(NamedTuple):
    """One attempt at a request, from queueing to reply."""

    method: str
    arguments: dict[str, Any]
    reply: asyncio.Future[_Reply]


@dataclass
class RouterStatistics:
    """Counts since the router started.

    Attributes:
        answered, batched_requests, retried, set_aside: See :data:`orchestrator.pool.prometheus.REQUESTS`.
        batches: Batched calls that were answered.
        per_host: Calls answered by each host.
    """

    answered: int = 0
    batches: int = 0
    batched_requests: int = 0
    retried: int = 0
    set_aside: int = 0
    per_host: list[int] = field(default_factory=list)


class Router:
    """Owns the host actors and the queue. It runs as one asyncio actor, so its state needs no lock.

    Args:
        actor_class: The host class, e.g. :class:`orchestrator.hosts.host.Host`.
        settings: What each host is built from.
        pool: How many hosts, and what each takes of the cluster.
        name: Name of the pool, a label of its Prometheus metrics.
        start_host: Starts one host and returns its handle; by default, a Ray actor.
    """

    def __init__(
        self,
        actor_class: Any,
        settings: ActorSettings,
        pool: PoolSettings,
        name: str = "pool",
        start_host: Callable[[], Any] | None = None,
    ):
        self.pool = pool
        self.actor_class = actor_class
        self.start_host = start_host or partial(_start_actor, actor_class, settings, pool, name)
        self.hosts = [_Host(actor=self.start_host(), up=False) for _ in range(pool.hosts)]
        self.opened = False
        self.queue: RequestQueue[_Host, _QueuedRequest] = RequestQueue(self.hosts, pool.max_batch)
        self.tasks: set[asyncio.Task[None]] = set()
        self.statistics = RouterStatistics()

    def open(self) -> None:
        """Give each host work as soon as it is up. Called at the first request: before it, no event loop runs."""
        if not self.opened:
            self.opened = True
            for host in self.hosts:
                self._start_task(self._bring_up(host, lost=False))

    async def request(
        self, method: str, arguments: dict[str, Any], batch_key: str | None = None
    ) -> tuple[Any, Exception | None]:
        """Answer a request: (value, None), or (None, error) if it is set aside. Arguments: see ``Request``."""
        self.open()
        batched = batch_key is not None and self.pool.max_batch > 1 and method in self.actor_class.BATCHED
        reply = await self._attempt(method, arguments, key=(method, batch_key) if batched else None)
        for _ in range(MAX_ATTEMPTS - 1):
            if reply.failure is None:
                break
            self.statistics.retried += 1
            reply = await self._attempt(method, arguments, exclusive=reply.host_lost)
        if reply.failure is None and not isinstance(reply.error, PoolError):
            return reply.value, reply.error
        self.statistics.set_aside += 1
        return None, reply.error or PoolError(
            f"{method}({_brief(arguments)}) failed {MAX_ATTEMPTS} times and is set aside; the last time: "
            f"{type(reply.failure).__name__}: {reply.failure}"
        )

    async def _attempt(
        self,
        method: str,
        arguments: dict[str, Any],
        *,
        key: tuple[str, str | None] | None = None,
        exclusive: bool = False,
    ) -> _Reply:
        """Queue a request once and wait for the reply; ``exclusive``: on a host that runs nothing else meanwhile."""
        queued = _QueuedRequest(method, arguments, asyncio.get_running_loop().create_future())
        self.queue.add(queued, key, exclusive=exclusive)
        self._dispatch()
        return await queued.reply

    def _dispatch(self) -> None:
        """Dispatch every request that can start now; called after each state change."""
        for assignment in self.queue.assignments():
            self._start_task(self._run(assignment))

    async def _run(self, assignment: Assignment[_Host, _QueuedRequest]) -> None:
        """Run an assignment, free its slots, and deliver its replies."""
        replies: Sequence[_Reply | Exception]
        begin = time.monotonic()
        try:
            replies = await self._call_once(assignment.host, assignment.items)
        except Exception as error:  # whatever it is, no caller may wait forever
            replies = [error] * len(assignment.items)
        for queued, reply in zip(assignment.items, replies, strict=True):
            if queued.reply.done():  # the caller was cancelled
                continue
            if isinstance(reply, Exception):
                queued.reply.set_exception(reply)
            else:
                queued.reply.set_result(reply)
        reservation = self.queue.release(assignment, reserve=True)
        self._dispatch()
        if reservation is not None:
            seconds = reservation_seconds(time.monotonic() - begin)
            asyncio.get_running_loop().call_later(seconds, self._cancel, assignment.host, reservation)

    def _cancel(self, host: _Host, reservation: Reservation) -> None:
        self.queue.cancel(host, reservation)
        self._dispatch()

    async def _call_once(self, host: _Host, requests: Sequence[_QueuedRequest]) -> list[_Reply]:
        """Answer these requests by one call; one reply each.

        An error of a batched call says nothing of any single request in it, so all of them are retried.
        """
        method = requests[0].method
        if len(requests) == 1:
            return [await self._call(host, method, requests[0].arguments)]
        arguments = {"requests": [queued.arguments for queued in requests]}
        reply = await self._call(host, self.actor_class.BATCHED[method], arguments)
        if reply.error is None and reply.failure is None:
            self.statistics.batches += 1
            self.statistics.batched_requests += len(requests)
            return [_Reply(value) for value in reply.value]
        return [reply._replace(error=None, failure=reply.failure or reply.error)] * len(requests)

    async def _call(self, host: _Host, method: str, arguments: dict[str, Any]) -> _Reply:
        """Call a host and classify how the call ends."""
        if host.broken is not None:
            return _Reply(error=host.broken)
        try:
            value = await self._call_actor(host, method, arguments)
        except RayTaskError as error:
            final = _final_error(error, f"{method}({_brief(arguments)}) failed")
            return _Reply(error=final) if final is not None else _Reply(failure=_cause(error))
        except (TimeoutError, *HOST_LOSSES) as error:
            self._mark_lost(host)
            return _Reply(failure=error, host_lost=True)
        self.statistics.answered += 1
        host.answered += 1
        return _Reply(value)

    def _mark_lost(self, host: _Host) -> None:
        """Give a lost host no work until it is up again: while Ray restarts the actor, its calls fail immediately."""
        if host.up:
            host.up = False
            self._start_task(self._bring_up(host, lost=True))

    async def _bring_up(self, host: _Host, *, lost: bool) -> None:
        """Wait until a host responds, however long its scheduling and its model's loading take; then give it work.

        A host that cannot be built is given work as well, so that requests report the reason.
        """
        try:
            await host.actor.process_id.options(max_task_retries=-1).remote()
        except RayTaskError as error:
            host.broken = _final_error(error, "a host cannot be built")
        except Exception:  # whatever it is, the next request meets it again
            if lost:
                host.actor = self.start_host()
        host.up = True
        self._dispatch()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)  # the event loop holds only a weak reference
        task.add_done_callback(self.tasks.discard)

    async def _call_actor(self, host: _Host, method: str, arguments: dict[str, Any]) -> Any:
        reference = getattr(host.actor, method).remote(**arguments)
        try:
            return await asyncio.wait_for(_as_coroutine(reference), self.pool.request_timeout)
        except TimeoutError:
            # Hung: nothing else will end it. Killing without no_restart makes Ray start a fresh one.
            ray.kill(host.actor, no_restart=False)
            raise

    def load(self) -> dict[str, int]:
        """Requests queued, slots occupied, and hosts up at this moment."""
        return {
            "waiting": len(self.queue),
            "in_flight": sum(host.in_flight for host in self.hosts),
            "hosts_up": sum(host.up for host in self.hosts),
        }

    async def stats(self) -> dict[str, Any]:
        """The fields of :class:`RouterStatistics`."""
        self.statistics.per_host = [host.answered for host in self.hosts]
        return asdict(self.statistics)


def _start_actor(actor_class: Any, settings: ActorSettings, pool: PoolSettings, name: str) -> Any:
    remote_class: Any = ray.remote(monitored(_reporting_failure(actor_class), partial(report_work, name)))
    return remote_class.options(
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_restarts=-1,
        max_task_retries=0,  # the router retries itself, since it may choose another host
        runtime_env={"env_vars": thread_limits(settings.threads)},
    ).remote(settings)


def _reporting_failure(actor_class: Any) -> Any:
    """A subclass of a host class whose ``process_id`` raises the error of the constructor.

    Ray would only pass on the text of an error that a constructor raises, and would start the actor again.
    """

    class Reporting(actor_class):  # type: ignore[misc]
        def __init__(self, *arguments: Any):
            self.failure: Exception | None = None
            try:
                super().__init__(*arguments)
            except Exception as error:
                if may_pass(error):
                    raise
                self.failure = error

        def process_id(self) -> Any:
            if self.failure is not None:
                raise self.failure
            return super().process_id()

    Reporting.__name__ = Reporting.__qualname__ = actor_class.__name__
    return Reporting


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, Exception) else error


def _final_error(error: RayTaskError, what: str) -> UserError | None:
    """An error that a retry would not change, for the user; None if a retry may succeed."""
    cause = _cause(error)
    if may_pass(cause):
        return None
    final = cause if isinstance(cause, UserError) else CodeError(f"{what}: {describe(cause, str(error))}")
    final.details = str(error)
    return final


async def _as_coroutine(reference: Any) -> Any:
    return await reference


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables that limit a process to this many threads. OpenMP reads them once, when it is loaded."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _brief(arguments: dict[str, Any]) -> str:
    """The scalar arguments of a request, for error messages."""
    small = {key: value for key, value in arguments.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{key}={value}" for key, value in small.items())
