"""Prometheus metrics of a pool: the totals counted by its hosts and its router."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Callable

import pytest
import torch

from orchestrator.config.pair_plan import PairKey
from orchestrator.hosts.host import Host
from orchestrator.hosts.network_check import SAMPLES
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool, PoolSettings, Request
from orchestrator.storage import Storage

NFE, PAIRS = 4, 3
"""Evaluations and pairs of one score request."""

CHECK = 2 * SAMPLES
"""Forward passes with which a host checks its network before the first request, without guidance."""


def test_a_host_counts_its_pairs_and_its_forward_passes(
    copied: Storage, host_settings: Callable[..., HostSettings], scoring: list[Request], specs: dict[PairKey, PairSpec]
) -> None:
    """The network's check counts, scoring B pairs at NFE n is n B forward passes, and pairs count with their own."""
    pool = LocalPool(Host(host_settings(copied)))
    work = pool.host.work
    pool.gather(scoring[:2])
    assert (work.pairs, work.forwards) == (0, CHECK + 2 * NFE * PAIRS)
    record = pool.call(Request.of(HostProtocol.make_shard, spec=specs[PairKey("test", 1.0, 0)], first=0, stop=16))
    assert (work.pairs, work.forwards) == (record.rows, CHECK + 2 * NFE * PAIRS + record.nfe_sum)


def test_guidance_doubles_the_count_of_forward_passes(
    copied: Storage, host_settings: Callable[..., HostSettings]
) -> None:
    """One guided velocity takes two forward passes of the network per sample."""
    host = LocalPool(Host(host_settings(copied))).host
    field = host._field(torch.zeros(5, dtype=torch.int64), 3.0)
    field(torch.zeros(5, *host.model.shape), torch.tensor(0.5, dtype=torch.float64))
    assert host.work.forwards == 2 * CHECK + 10


def _served() -> dict[str, float]:
    """The pool's metrics served by this machine's Ray node: their values by name and labels."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("ray_bespoke")}


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_serves_the_counts_of_hosts_and_router(
    ray_session: None,
    made: Storage,
    host_settings: Callable[..., HostSettings],
    scoring: list[Request],
    facts: ModelFacts,
) -> None:
    """A Prometheus scrape sees them within the half minute that Ray takes to report."""
    pool = f"metered-{os.getpid()}"  # this Ray also serves the metrics of other pools
    hosts = RayPool.start(pool, Host, host_settings(made), PoolSettings(hosts=1))
    assert hosts.call(Request.of(HostProtocol.facts)) == facts
    hosts.gather(scoring[:2])

    def total(name: str) -> float:
        pattern = re.compile(rf'ray_bespoke_{name}\{{.*"{pool}".*\}}')
        return sum(value for labels, value in _served().items() if pattern.fullmatch(labels))

    expected = {"answered_total": 3, "hosts_up": 1, "waiting": 0, "forwards_total": CHECK + 2 * NFE * PAIRS}
    end = time.monotonic() + 60
    while (served := {name: total(name) for name in expected}) != expected:
        assert time.monotonic() < end, (served, _served())
        time.sleep(1)
    hosts.close()
