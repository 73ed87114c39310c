"""The pool on Ray, as trials and the driver use it: a handle on the router actor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import PoolError
from orchestrator.pool.prometheus import monitored, report_router
from orchestrator.pool.queue import SLOTS
from orchestrator.pool.requests import ActorSettings, Outcome, Pool, PoolSettings, R, Request
from orchestrator.pool.router import HOST_LOSSES, MAX_ATTEMPTS, Router, thread_limits

NAMESPACE = "bespoke"
"""Ray namespace in which routers are found by name."""

ROUTER_RETRY_PAUSE = 2.0
"""Pause before a request to a lost router is retried: until Ray has restarted the actor, its calls fail immediately."""

ROUTER_PATIENCE = 180.0
"""Seconds for which such retries go on. Ray notices the loss of the router's node only after missed heartbeats."""


class _Submitted(NamedTuple):
    """A request that the router has not answered yet.

    Attributes:
        number: Its position among the caller's requests.
        request: The request.
        losses: How often it was lost with the router, or refused while the router was away.
        since: Time of the first loss, in seconds of the monotonic clock.
    """

    number: int
    request: Request[Any]
    losses: int = 0
    since: float = 0.0


class RayPool(Pool):
    """Hosts as Ray actors behind one router.

    Args:
        router: Handle of the router actor.
        hosts: Number of its hosts.
        clock: Has ``monotonic`` and ``sleep``, as the module ``time``.
    """

    def __init__(self, router: Any, hosts: int, clock: Any = time):
        self.router, self.clock = router, clock
        self.window = hosts * SLOTS

    @classmethod
    def start(cls, name: str, actor_class: Any, settings: ActorSettings, pool: PoolSettings) -> RayPool:
        """Start a router and its hosts, or attach to those of this name that are already up.

        Args:
            name: Name of the pool.
            actor_class: The host class, built from ``settings`` on each node.
            settings: What each host is built from.
            pool: How many hosts, and what each takes of the cluster.
        """
        router = (
            ray.remote(monitored(Router, partial(report_router, name)))
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,
                # On the driver's node, whose loss ends the work anyway; any other node would be one more to lose.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
                runtime_env={"env_vars": thread_limits(1)},
            )
            .remote(actor_class, settings, pool, name)
        )
        return cls(router, pool.hosts)

    @classmethod
    def attach(cls, name: str, hosts: int) -> RayPool:
        """Attach to the pool of this name from another process of the same cluster."""
        return cls(ray.get_actor(name, namespace=NAMESPACE), hosts)

    def close(self) -> None:
        """Stop the router, and with it its hosts. Their share of the cluster is free again."""
        with suppress(Exception):  # if the cluster is gone, so are they
            ray.kill(self.router)

    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        waiting = (_Submitted(index, request) for index, request in enumerate(requests))
        lost: deque[_Submitted] = deque()
        in_flight: dict[Any, _Submitted] = {}
        while True:
            while len(in_flight) < self.window and (submitted := lost.popleft() if lost else next(waiting, None)):
                in_flight[self.router.request.remote(*submitted.request)] = submitted
            if not in_flight:
                return
            done = self._first_done(list(in_flight))
            submitted = in_flight.pop(done)
            try:
                value, error = self._get(done)
            except HOST_LOSSES as loss:
                # The router itself was lost. Its calls fail until Ray has noticed and restarted it.
                lost.append(_after_loss(submitted, loss, self.clock.monotonic()))
                self.clock.sleep(ROUTER_RETRY_PAUSE)
                continue
            yield Outcome(submitted.number, value, error)

    def _first_done(self, references: list[Any]) -> Any:
        (done,), _ = ray.wait(references, num_returns=1)
        return done

    def _get(self, reference: Any) -> tuple[Any, Exception | None]:
        return ray.get(reference)

    def statistics(self) -> dict[str, Any]:
        """The router's counts: the fields of ``RouterStatistics``."""
        return ray.get(self.router.stats.remote())


def _after_loss(submitted: _Submitted, loss: Exception, now: float) -> _Submitted:
    """The request with one more loss counted, at ``now``.

    Raises:
        PoolError: It was lost too often, and for too long.
    """
    if isinstance(loss, RayActorError) and loss.actor_init_failed:
        raise PoolError(f"the pool's router cannot be started: {loss}") from loss
    submitted = submitted._replace(losses=submitted.losses + 1, since=submitted.since if submitted.losses else now)
    if submitted.losses >= MAX_ATTEMPTS and now - submitted.since > ROUTER_PATIENCE:
        raise PoolError(
            f"the pool's router was lost {submitted.losses} times in {now - submitted.since:.0f} s; the last time: "
            f"{loss}"
        ) from loss
    return submitted
