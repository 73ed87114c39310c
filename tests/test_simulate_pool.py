"""The simulation of the pool: what can be worked out by hand comes out, and what limits a run is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from pool_simulation import Load, Outcome, Simulation, Times, bottleneck  # noqa: E402
from simulate_pool import differences, seconds_of_queue  # noqa: E402

TIMES = Times(advance=2.0, score=0.5, batched=(1.2, 1.6, 2.4))


def test_one_trial_alone_takes_the_sum_of_what_it_does() -> None:
    """Nothing waits: every part counts once, at the host, the router, on the wire, at MLflow and in the trial."""
    times = dataclasses.replace(TIMES, router=0.01, wire=0.02, log=0.1, own=0.03)
    found = Simulation(Load(1, validations=3, keys=1), times, hosts=2, max_batch=8).run()
    requests, logs = 1 + 3 + 2, 4
    assert found.seconds == pytest.approx(3 * 2.0 + 6 * 0.5 + requests * 0.03 + logs * (0.1 + 0.03))
    assert found.latency == pytest.approx((3 * 2.0 + 6 * 0.5) / requests + 0.03)
    assert found.host_busy == pytest.approx((3 * 2.0 + 6 * 0.5) / (2 * found.seconds))
    assert found.batched_share == 0


@pytest.mark.parametrize("hosts", [1, 4])
def test_hosts_that_always_have_work_share_it(hosts: int) -> None:
    """Many trials, nothing batched: the hosts' work divided by their number, and no host idles before the end."""
    workload = Load(40, validations=5, keys=1)
    found = Simulation(workload, TIMES, hosts=hosts, max_batch=1).run()
    work = 40 * (5 * 2.0 + 8 * 0.5)
    assert work / hosts <= found.seconds < 1.03 * work / hosts
    assert found.host_busy > 0.97


def test_merged_trials_cost_a_host_what_was_measured_for_so_many() -> None:
    """Eight trials of one key on one host advance as one: 2.4 times one's seconds, where they would take 8 times."""
    workload = Load(8, validations=10, keys=1)
    together = Simulation(workload, TIMES, hosts=1, max_batch=8).run()
    assert together.batched_share > 0.8
    assert together.seconds < 0.7 * Simulation(workload, TIMES, hosts=1, max_batch=1).run().seconds
    apart = Simulation(dataclasses.replace(workload, keys=8), TIMES, hosts=1, max_batch=8).run()
    assert apart.batched_share == 0


def test_a_group_is_never_larger_than_the_limit() -> None:
    """With at most two together a host does at least half of the calls."""
    found = Simulation(Load(16, validations=10, keys=1), TIMES, hosts=1, max_batch=2).run()
    assert found.seconds >= 80 * 2.4 + 16 * 13 * 0.5


def test_what_limits_a_run_is_named() -> None:
    """Hosts, the router, or MLflow: whichever is busy all the time."""
    workload = Load(50, validations=5, keys=50)
    for change, name in (
        ({}, "the hosts"),
        ({"router": 1.0}, "the router"),
        ({"log": 2.0}, "MLflow"),
    ):
        found = Simulation(workload, dataclasses.replace(TIMES, **change), hosts=8, max_batch=8).run()
        assert bottleneck(found).startswith(f"{name}, busy"), change


def test_the_same_simulation_gives_the_same_numbers() -> None:
    """No chance in it."""
    times = dataclasses.replace(TIMES, router=0.001, log=0.01)
    first, second = (Simulation(Load(100, 5, 4), times, hosts=8, max_batch=8).run() for _ in range(2))
    assert first == second


def test_differences_are_relative_to_the_real_run() -> None:
    """A simulation that says 12 s where 10 were measured is 20 % off."""
    real = Outcome(seconds=10, host_busy=0.5, latency=1.0, logs_per_second=4, batched_share=0)
    found = differences(real, dataclasses.replace(real, seconds=12, logs_per_second=3))
    assert found == pytest.approx({"seconds": 0.2, "host_busy": 0, "latency": 0, "logs_per_second": -0.25})


def test_the_real_routers_queue_is_measured_without_ray() -> None:
    """It answers as many as it is asked to, and that costs some CPU time."""
    assert seconds_of_queue(waiting=5, hosts=2, answers=5) > 0


REAL = """
import dataclasses, json, sys, tempfile
sys.path.append(sys.argv[1])
from pool_simulation import Load, Simulation, Times
from simulate_pool import differences, run_real_pool, start_ray

start_ray(cpus=1)
times = Times(advance=0.4, score=0.1, batched=(1.2, 1.6, 2.4))
load = Load(8, validations=5, keys=1)
print(json.dumps([
    differences(
        run_real_pool(load, times, 2, max_batch, lambda number: None), Simulation(load, times, 2, max_batch).run()
    )
    for max_batch in (1, 8)
]))
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_real_pool_takes_what_the_simulation_says() -> None:
    """Ray, the router and two host actors that sleep, eight trials: within 20 %."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", REAL, str(BENCHMARKS)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert all(abs(difference) < 0.2 for difference in found.values()), found
