"""What Prometheus would be told of a pool: the totals that hosts and the router count themselves."""

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
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool, PoolSettings, Request
from orchestrator.storage import Storage

NFE, PAIRS = 4, 3
"""Of one request for scores."""


def test_a_host_counts_its_pairs_and_the_forwards_of_its_network(
    copied: Storage, host_settings: Callable[..., HostSettings], scoring: list[Request], specs: dict[PairKey, PairSpec]
) -> None:
    """Scores of NFE n on B pairs are n B forwards; pairs that are made count as well, with what they took."""
    pool = LocalPool(Host(host_settings(copied)))
    work = pool.host.work
    pool.gather(scoring[:2])
    assert (work.pairs, work.evaluations) == (0, 2 * NFE * PAIRS)
    record = pool.call("make_shard", spec=specs[PairKey("test", 1.0, 0)], shard=0)
    assert (work.pairs, work.evaluations) == (record.rows, 2 * NFE * PAIRS + record.nfe_sum)


def test_guidance_counts_twice(copied: Storage, host_settings: Callable[..., HostSettings]) -> None:
    """Two forwards of the network for one velocity."""
    host = LocalPool(Host(host_settings(copied))).host
    field = host._field(torch.zeros(5, dtype=torch.int64), 3.0)
    field(torch.zeros(5, *host.model.shape), torch.tensor(0.5, dtype=torch.float64))
    assert host.work.evaluations == 10


def _served() -> dict[str, float]:
    """Every metric of this machine's Ray whose name begins as ours do, by name and labels."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("ray_bespoke")}


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_serves_what_hosts_and_the_router_count(
    ray_session: None,
    made: Storage,
    host_settings: Callable[..., HostSettings],
    scoring: list[Request],
    facts: ModelFacts,
) -> None:
    """As a scrape of Prometheus would find it, within the half minute that Ray takes to report."""
    pool = f"metered-{os.getpid()}"  # other pools of this Ray are told of as well
    hosts = RayPool.start(pool, Host, host_settings(made), PoolSettings(hosts=1))
    assert hosts.call("facts") == facts
    hosts.gather(scoring[:2])

    def total(name: str) -> float:
        pattern = re.compile(rf'ray_bespoke_{name}\{{.*"{pool}".*\}}')
        return sum(value for labels, value in _served().items() if pattern.fullmatch(labels))

    expected = {"answered_total": 3, "hosts_up": 1, "waiting": 0, "evaluations_total": 2 * NFE * PAIRS}
    end = time.monotonic() + 60
    while (found := {name: total(name) for name in expected}) != expected:
        assert time.monotonic() < end, (found, _served())
        time.sleep(1)
    hosts.close()
