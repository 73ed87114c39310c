"""A distillation at the least cost on a tiny random network, in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config.base import PluginConfig
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.pool.requests import LocalPool, Outcome, R, Request
from orchestrator.storage import Storage
from sweeps.distil.place import Place

NETWORK: dict[str, Any] = {
    "factory": "own_networks:Flow",
    "path": str(Path(__file__).parent),
    "shape": [1, 2, 3],
    "prediction": "velocity",
    "native_scheduler": "cond_ot",
    "call": "x, t, y",
    "classes": 3,
    "null_label": 3,
}


class KilledError(BaseException):
    """The command was killed."""


class CountingPool(LocalPool):
    """Counts requests, and can kill the command at one of them.

    Attributes:
        counts: Requests so far, by method.
        kill_at: Number of the request that kills the command before it is answered; None: none does.
    """

    def __init__(self, host: Any, kill_at: int | None = None):
        super().__init__(host)
        self.counts: Counter[str] = Counter()
        self.kill_at = kill_at

    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        for index, request in enumerate(requests):
            if self.counts.total() == self.kill_at:
                raise KilledError
            self.counts[request.method] += 1
            for outcome in super().map([request]):
                yield replace(outcome, index=index)


def tiny_place(root: Path, kill_at: int | None = None) -> Place:
    """A place with a host of the tiny network. Its network is random, which the examination would refuse."""
    storage = Storage.at(root)
    host = Host(HostSettings(adapter="torch_module", options=NETWORK, storage=storage.root))
    return Place(
        pool=CountingPool(host, kill_at),
        storage=storage,
        facts=host.facts(),
        conditioning=PluginConfig(name="labels", options={"classes": 3}),
        force=True,
        announce=lambda sentence: None,
    )
