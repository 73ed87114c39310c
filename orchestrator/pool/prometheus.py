"""Prometheus metrics of a pool, exported through Ray: every node serves those of its processes.

Hosts and scorers report their work (:class:`orchestrator.hosts.work.Work`); the router reports its queue. One thread
per process polls them every few seconds, so no request pays for monitoring. In Prometheus, the names below start with
``ray_``, and counters end in ``_total``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray.util.metrics import Counter, Gauge

SECONDS = 5.0
"""Polling interval. Ray itself exports every 10 s."""

WORK = {
    "pairs": "Ground-truth pairs made.",
    "forwards": "Forward passes of the model's network, per sample.",
    "scored": "Samples measured by metrics.",
}
REQUESTS = {
    "answered": "Calls that a host answered; a batched call counts once.",
    "batched_requests": "Requests answered in batched calls.",
    "retried": "Attempts beyond a request's first.",
    "set_aside": "Requests that were given up.",
}
LOAD = {
    "waiting": "Requests that wait for a host.",
    "in_flight": "Occupied slots of the hosts, of two per host.",
    "hosts_up": "Hosts that are given work.",
}


class Counters:
    """Prometheus counters that follow totals counted elsewhere.

    Args:
        descriptions: Name and description of each total.
        tags: Labels that all of them carry.
    """

    def __init__(self, descriptions: Mapping[str, str], tags: dict[str, str]):
        self.exported = dict.fromkeys(descriptions, 0)
        self.tags = tags
        self.counters = {
            name: Counter(f"bespoke_{name}", text, tag_keys=tuple(tags)) for name, text in descriptions.items()
        }

    def follow(self, totals: Mapping[str, int]) -> None:
        """Raise the counters to these totals."""
        for name, counter in self.counters.items():
            if (more := totals[name] - self.exported[name]) > 0:
                counter.inc(more, self.tags)
                self.exported[name] += more


def report_work(pool: str, actor: Any) -> Callable[[], None]:
    """A function that exports the :class:`~orchestrator.hosts.work.Work` of a host or scorer."""
    counters = Counters(WORK, {"pool": pool})
    return lambda: counters.follow(asdict(actor.work))


def report_router(pool: str, router: Any) -> Callable[[], None]:
    """A function that exports a router's statistics and load."""
    tags = {"pool": pool}
    counters = Counters(REQUESTS, tags)
    gauges = {name: Gauge(f"bespoke_{name}", text, tag_keys=tuple(tags)) for name, text in LOAD.items()}

    def export() -> None:
        counters.follow(asdict(router.statistics))
        for name, value in router.load().items():
            gauges[name].set(value, tags)

    return export


def monitored(actor_class: type, make_report: Callable[[Any], Callable[[], None]]) -> type:
    """A subclass of ``actor_class`` whose instances export their metrics for as long as their process lives."""

    class Monitored(actor_class):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            # A daemon thread does not keep alive a process whose actor has ended.
            threading.Thread(target=self._export, name="pool-metrics", daemon=True).start()

        def _export(self) -> None:
            report, pause = make_report(self), threading.Event()
            while True:
                report()
                pause.wait(SECONDS)

    Monitored.__name__ = Monitored.__qualname__ = actor_class.__name__  # shown by Ray and in errors
    return Monitored
