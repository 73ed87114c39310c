"""The simulation of the pool agrees with hand-computed cases and names the bottleneck of a run."""

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


def test_one_trial_alone_takes_the_sum_of_its_parts() -> None:
    """Nothing waits, so every part counts once: host, router, wire, MLflow and the trial's own time."""
    times = dataclasses.replace(TIMES, router=0.01, wire=0.02, log=0.1, own=0.03)
    outcome = Simulation(Load(1, validations=3, keys=1), times, hosts=2, max_batch=8).run()
    requests, logs = 1 + 3 + 2, 4
    assert outcome.seconds == pytest.approx(3 * 2.0 + 6 * 0.5 + requests * 0.03 + logs * (0.1 + 0.03))
    assert outcome.latency == pytest.approx((3 * 2.0 + 6 * 0.5) / requests + 0.03)
    assert outcome.host_busy == pytest.approx((3 * 2.0 + 6 * 0.5) / (2 * outcome.seconds))
    assert outcome.batched_share == 0


@pytest.mark.parametrize("hosts", [1, 4])
def test_hosts_that_always_have_work_share_it(hosts: int) -> None:
    """Many trials without batching take the total work divided by the hosts, and no host idles before the end."""
    workload = Load(40, validations=5, keys=1)
    outcome = Simulation(workload, TIMES, hosts=hosts, max_batch=1).run()
    work = 40 * (5 * 2.0 + 8 * 0.5)
    assert work / hosts <= outcome.seconds < 1.03 * work / hosts
    assert outcome.host_busy > 0.97


def test_batched_trials_take_the_measured_time_of_a_batch() -> None:
    """Eight trials of one key on one host advance as one batch, in 2.4 times the time of one trial, not 8 times."""
    workload = Load(8, validations=10, keys=1)
    batched = Simulation(workload, TIMES, hosts=1, max_batch=8).run()
    assert batched.batched_share > 0.8
    assert batched.seconds < 0.7 * Simulation(workload, TIMES, hosts=1, max_batch=1).run().seconds
    unbatched = Simulation(dataclasses.replace(workload, keys=8), TIMES, hosts=1, max_batch=8).run()
    assert unbatched.batched_share == 0


def test_a_batch_is_never_larger_than_the_limit() -> None:
    """With at most two requests per batch, a host runs at least half as many batches as there are requests."""
    outcome = Simulation(Load(16, validations=10, keys=1), TIMES, hosts=1, max_batch=2).run()
    assert outcome.seconds >= 80 * 2.4 + 16 * 13 * 0.5


def test_the_bottleneck_of_a_run_is_named() -> None:
    """The hosts, the router or MLflow, whichever is always busy."""
    workload = Load(50, validations=5, keys=50)
    for change, name in (
        ({}, "the hosts"),
        ({"router": 1.0}, "the router"),
        ({"log": 2.0}, "MLflow"),
    ):
        outcome = Simulation(workload, dataclasses.replace(TIMES, **change), hosts=8, max_batch=8).run()
        assert bottleneck(outcome).startswith(f"{name}, busy"), change


def test_the_simulation_is_deterministic() -> None:
    """Two simulations with the same settings have equal outcomes."""
    times = dataclasses.replace(TIMES, router=0.001, log=0.01)
    first, second = (Simulation(Load(100, 5, 4), times, hosts=8, max_batch=8).run() for _ in range(2))
    assert first == second


def test_differences_are_relative_to_the_real_run() -> None:
    """A simulation of 12 s for a measured 10 s is 20 % off."""
    real = Outcome(seconds=10, host_busy=0.5, latency=1.0, logs_per_second=4, batched_share=0)
    relative = differences(real, dataclasses.replace(real, seconds=12, logs_per_second=3))
    assert relative == pytest.approx({"seconds": 0.2, "host_busy": 0, "latency": 0, "logs_per_second": -0.25})


def test_the_queue_of_the_real_router_is_measured_without_ray() -> None:
    """Answering the requested number of requests takes some CPU time."""
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
def test_a_real_pool_takes_the_simulated_time() -> None:
    """With Ray, the router, two host actors that sleep and eight trials, they agree within 20 %."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", REAL, str(BENCHMARKS)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    for relative in json.loads(done.stdout.splitlines()[-1]):
        assert all(abs(difference) < 0.2 for difference in relative.values()), relative
