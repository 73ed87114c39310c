"""What a pool tells Prometheus, by way of Ray: every node serves the metrics of its processes.

Hosts and scorers tell what they have done (:class:`orchestrator.hosts.work.Work`), the router what it knows of them.
Each process has one thread that looks every few seconds: no request pays for being watched. Names are as below with
``ray_`` before them, and counters end in ``_total``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray.util.metrics import Counter, Gauge

SECONDS = 5.0
"""Between two looks; Ray itself reports every 10 s."""

WORK = {
    "pairs": "Ground-truth pairs made.",
    "evaluations": "Forwards of the model's network, of one sample each.",
    "scored": "Samples that metrics have measured.",
}
REQUESTS = {
    "answered": "Calls that a host answered; a shared one counts once.",
    "shared_requests": "Requests that were answered together with others.",
    "retried": "Requests that were asked again.",
    "set_aside": "Requests that were given up.",
}
NOW = {
    "waiting": "Requests that wait for a host.",
    "in_flight": "Places that are taken at the hosts, two a host.",
    "hosts_up": "Hosts that are given work.",
}


class Counters:
    """Prometheus counters that follow totals counted elsewhere.

    Args:
        described: Names of the totals, and what they are.
        tags: Labels that all of them carry.
    """

    def __init__(self, described: Mapping[str, str], tags: dict[str, str]):
        self.told = dict.fromkeys(described, 0)
        self.tags = tags
        self.counters = {
            name: Counter(f"bespoke_{name}", text, tag_keys=tuple(tags)) for name, text in described.items()
        }

    def follow(self, totals: Mapping[str, int]) -> None:
        """Count up to these totals."""
        for name, counter in self.counters.items():
            if (more := totals[name] - self.told[name]) > 0:
                counter.inc(more, self.tags)
                self.told[name] += more


def work_teller(pool: str, worker: Any) -> Callable[[], None]:
    """Tells the :class:`~orchestrator.hosts.work.Work` of a host or a scorer."""
    counters = Counters(WORK, {"pool": pool})
    return lambda: counters.follow(asdict(worker.work))


def router_teller(pool: str, router: Any) -> Callable[[], None]:
    """Tells a router's statistics, and what is waiting and running."""
    tags = {"pool": pool}
    counters = Counters(REQUESTS, tags)
    gauges = {name: Gauge(f"bespoke_{name}", text, tag_keys=tuple(tags)) for name, text in NOW.items()}

    def tell() -> None:
        counters.follow(asdict(router.statistics))
        for name, value in router.now().items():
            gauges[name].set(value, tags)

    return tell


def telling(actor: type, teller: Callable[[Any], Callable[[], None]]) -> type:
    """The class of an actor that is told about as long as its process lives; otherwise ``actor`` itself."""

    class Telling(actor):  # type: ignore[misc]
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            # A daemon: it must not keep alive a process whose actor has ended.
            threading.Thread(target=self._tell, name="pool-metrics", daemon=True).start()

        def _tell(self) -> None:
            tell, pause = teller(self), threading.Event()
            while True:
                tell()
                pause.wait(SECONDS)

    Telling.__name__ = Telling.__qualname__ = actor.__name__  # what Ray shows, and errors name
    return Telling
