"""How many trials and hosts one router and one MLflow store can serve: a simulation, checked against a real run.

Every request costs the router time, every log costs MLflow time (benchmarks/pool_simulation.py).

The parameters are measured first: the router's CPU time per request (of its process, in a real pool whose hosts answer
at once; and without Ray, while few and many requests wait), the duration of a log (SQLite), and a host's times to
advance and to score (the digits model, one core). The simulation is then compared with a real run: Ray, the router, 4
host actors that sleep instead of computing, 16 trials as threads, MLflow. If they differ by more than --tolerance, the
benchmark ends with an error. Otherwise it simulates 1,000 trials on 64 hosts and names their bottleneck.

python benchmarks/simulate_pool.py
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from pool_simulation import Load, Outcome, Simulation, Times, bottleneck, steps
from processes import SAME_PRIORITY
from publishing import command, load, publish, results_option, table

from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.hosts.work import Work
from orchestrator.pool.client import NAMESPACE, RayPool
from orchestrator.pool.queue import SLOTS
from orchestrator.pool.requests import PoolSettings, Request
from orchestrator.pool.router import Router

TRIALS_REAL, HOSTS_REAL = 16, 4
TRIALS, HOSTS = 1000, 64
PAYLOAD = np.zeros(1000)
"""Payload of a request, about as large as theta and an optimiser's state."""


# ---- a real pool, with hosts that sleep ---------------------------------------------------------------------------


class SleepingHost:
    """Sleeps for as long as a host would work, then answers. Has neither a model nor pairs."""

    BATCHED = Host.BATCHED

    def __init__(self, settings: SleepingSettings):
        self.times = settings.times
        self.work = Work()

    def process_id(self) -> int:
        return os.getpid()

    def advance(self, payload: Any) -> Any:
        time.sleep(self.times.advance_batched(1))
        return payload

    def advance_batched(self, requests: Sequence[dict[str, Any]]) -> list[Any]:
        time.sleep(self.times.advance_batched(len(requests)))
        return [request["payload"] for request in requests]

    def score(self, payload: Any) -> Any:
        time.sleep(self.times.score)
        return payload


@dataclass(frozen=True, kw_only=True)
class SleepingSettings(HostSettings):
    """Settings of a :class:`SleepingHost`, which loads nothing."""

    adapter: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    storage: str = "none"
    times: Times


def start_ray(cpus: int) -> None:
    import ray

    os.environ.update(SAME_PRIORITY)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = str(Path(__file__).parent)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}},
    )


def start_pool(name: str, times: Times, hosts: int, max_batch: int) -> RayPool:
    pool = RayPool.start(
        name, SleepingHost, SleepingSettings(times=times), PoolSettings(hosts=hosts, cpus=0.01, max_batch=max_batch)
    )
    pids: set[int] = set()
    while len(pids) < hosts:  # until all of them are up
        pids |= set(pool.gather([Request.of(HostProtocol.process_id)] * 4 * hosts))
    return pool


def run_real_pool(workload: Load, times: Times, hosts: int, max_batch: int, log: Callable[[int], None]) -> Outcome:
    """Run the same trials as threads on a real pool."""
    pool = start_pool(f"real-{max_batch}-{times.advance}", times, hosts, max_batch)
    before = pool.statistics()
    latencies: list[float] = []
    logs = itertools.count()

    def trial(number: int) -> None:
        for kind, key in steps(workload, f"key {number % workload.keys}"):
            if kind == "log":
                log(number)
                next(logs)
            elif kind != "own":
                begin = time.perf_counter()
                pool.gather([Request(kind, {"payload": PAYLOAD}, key)])
                latencies.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=trial, args=(number,)) for number in range(workload.trials)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    after = pool.statistics()
    pool.close()
    batched_requests = after["batched_requests"] - before["batched_requests"]
    batches = after["batches"] - before["batches"]
    advances, scores = workload.trials * workload.validations, workload.trials * 3
    # The duration of a batched call follows from its number of requests, of which only the mean is known.
    mean = batched_requests / batches if batches else 1
    worked = (advances - batched_requests) * times.advance_batched(1) + batches * times.advance_batched(mean)
    return Outcome(
        seconds=seconds,
        host_busy=(worked + scores * times.score) / (hosts * seconds),
        latency=float(np.mean(latencies)),
        logs_per_second=next(logs) / seconds,
        batched_share=batched_requests / advances,
    )


# ---- parameters ---------------------------------------------------------------------------------------------------


def router_seconds(requests: int = 2000) -> tuple[float, float]:
    """CPU seconds of the router's process per request to hosts that answer at once, and the latency of one alone."""
    import psutil

    pool = start_pool("instant", Times(0.0, 0.0), 2, 1)
    (router,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if any(part.startswith("ray::Router") for part in process.cmdline()[:1])
    ]
    # As many at once as in the real run: a longer queue has a cost of its own.
    pool.window = TRIALS_REAL
    pool.gather([Request("score", {"payload": PAYLOAD})] * 200)
    before = sum(router.cpu_times()[:2])
    pool.gather([Request("score", {"payload": PAYLOAD})] * requests)
    spent = sum(router.cpu_times()[:2]) - before
    begin = time.perf_counter()
    for _ in range(200):
        pool.call(Request("score", {"payload": PAYLOAD}))
    alone = (time.perf_counter() - begin) / 200
    pool.close()
    return spent / requests, alone


class _HeldMethod:
    """A host method whose answers are set by the caller."""

    def __init__(self) -> None:
        self.pending: deque[asyncio.Future[None]] = deque()

    def remote(self, **arguments: Any) -> asyncio.Future[None]:
        answer = asyncio.get_running_loop().create_future()
        self.pending.append(answer)
        return answer


async def _up() -> None:
    """The reply of a host that is up at once."""


def seconds_of_queue(waiting: int, hosts: int, answers: int = 50) -> float:
    """CPU seconds of the real router, without Ray, per answer and next request, while ``waiting`` requests queue."""
    score = _HeldMethod()
    up = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=_up))

    async def measure() -> float:
        settings = SleepingSettings(times=Times(0.0, 0.0))
        start = partial(SimpleNamespace, score=score, process_id=up)
        router = Router(SleepingHost, settings, PoolSettings(hosts=hosts), start_host=start)
        number = SLOTS * hosts + waiting
        requests = [asyncio.create_task(router.request("score", {})) for _ in range(number)]
        while len(score.pending) < SLOTS * hosts:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        begin = time.process_time()
        for _ in range(answers):
            requests.append(asyncio.create_task(router.request("score", {})))
            score.pending.popleft().set_result(None)
            await asyncio.sleep(0.02)  # CPU time is measured, so idling here costs nothing
        spent = time.process_time() - begin
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        return spent / answers

    return asyncio.run(measure())


def digits_times(validate_every: int) -> Times:
    """Times of a host with the digits model at NFE 8 and the settings of the shipped experiment, on one core."""
    from orchestrator.config.pair_plan import pair_specs
    from orchestrator.config.reading import parse_config
    from orchestrator.hosts.distillation import to_numpy
    from orchestrator.pairs.make import ensure_pairs
    from orchestrator.pool.requests import LocalPool, Request
    from orchestrator.storage import Storage
    from sweeps.space import learned_points

    measured = 5
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "name": "times",
            "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
            "pairs": {"train": 512, "validation": 1024, "test": 64, "rtol": 1e-3, "atol": 1e-3},
            "nfe": [8],
            "learned": [{"family": "bns", "start": ["midpoint"], "iterations": 1000, "validate_every": measured}],
            "storage": folder,
        }
        config = parse_config(content, "the benchmark's configuration")
        local = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=folder)))
        facts = local.call(Request.of(HostProtocol.facts))
        specs = pair_specs(config, facts)
        ensure_pairs(Storage.at(folder), list(specs.values()), local, wait=False, announce=lambda sentence: None)
        (point,) = learned_points(config, specs, {}, facts.scheduler)
        run = point.run
        start = point.start.solver(point.nfe, point.sigma0)
        state = run.method.begin(run.build().start(start, facts.scheduler))
        theta = to_numpy(start.to_ns(facts.scheduler).flat())
        calls = [{"run": run, "state": state, "steps": measured}] * 8

        def best(action: Callable[[], Any]) -> float:
            seconds = []
            for _ in range(4):
                begin = time.thread_time()
                action()
                seconds.append(time.thread_time() - begin)
            return min(seconds[1:])

        single = best(lambda: local.call(Request.of(HostProtocol.advance, **calls[0])))
        batched_seconds = [best(lambda n=n: local.host.advance_batched(calls[:n])) for n in (2, 4, 8)]
        validation = Request.of(HostProtocol.score, theta=theta, pairs=point.validation, metrics=["psnr"])
        score = best(lambda: local.call(validation))
    two, four, eight = (seconds / single for seconds in batched_seconds)
    return Times(advance=single * validate_every / measured, batched=(two, four, eight), score=score)


class Logger:
    """Logs to an MLflow store in SQLite, with one run per trial."""

    def __init__(self, folder: str, runs: int):
        from orchestrator.tracking.mlflow import Tracker

        tracker = Tracker(f"sqlite:///{folder}/mlflow.db")
        experiment = tracker.experiment("pool", f"{folder}/artifacts")
        self.runs = [tracker.run(experiment, f"trial {number}", f"trial {number}") for number in range(runs)]
        self.steps = itertools.count()

    def __call__(self, number: int) -> None:
        self.runs[number].metrics({"validation_psnr_db": 40.0, "loss": 0.1}, step=next(self.steps))

    def seconds(self, count: int = 100) -> float:
        """Median duration of a log, one after the other; the median excludes other work of the machine."""
        for number in range(len(self.runs)):
            self(number)
        seconds = []
        for number in range(count):
            begin = time.perf_counter()
            self(number % len(self.runs))
            seconds.append(time.perf_counter() - begin)
        return float(np.median(seconds))


# ---- the command --------------------------------------------------------------------------------------------------


def _row(name: str, outcome: Outcome) -> list[str]:
    return [
        name,
        f"{outcome.seconds:.1f}",
        f"{100 * (1 - outcome.host_busy):.1f}",
        f"{1000 * outcome.latency:.0f}",
        f"{outcome.logs_per_second:.2f}",
        f"{100 * outcome.batched_share:.0f}",
        *("—" if np.isnan(share) else f"{100 * share:.1f}" for share in (outcome.router_busy, outcome.log_busy)),
    ]


HEADING = ["run", "s", "hosts idle, %", "ms per request", "logs/s", "batched, %", "router busy, %", "MLflow busy, %"]


def differences(real: Outcome, simulated: Outcome) -> dict[str, float]:
    """Relative differences of the simulation from the real run."""
    return {
        name: getattr(simulated, name) / getattr(real, name) - 1
        for name in ("seconds", "host_busy", "latency", "logs_per_second")
    }


def check(sleeping: Times) -> tuple[str, float, list[str]]:
    """Compare real and simulated runs; return the name and value of the largest difference, and report sections."""
    workload = Load(TRIALS_REAL, validations=10, keys=2)
    rows, worst, beyond = [], ("", 0.0), ""
    with tempfile.TemporaryDirectory() as folder:
        logger = Logger(folder, TRIALS_REAL)
        short = replace(sleeping, advance=sleeping.advance / 8, score=sleeping.score / 8)
        cases = {
            "max_batch 1": (sleeping, 1),
            "max_batch 8": (sleeping, 8),
            "max_batch 8, an eighth of the sleep": (short, 8),
        }
        for name, (asleep, max_batch) in cases.items():
            real = run_real_pool(workload, asleep, HOSTS_REAL, max_batch, logger)
            simulated = Simulation(workload, asleep, HOSTS_REAL, max_batch).run()
            rows += [_row(f"real, {name}", real), _row(f"simulated, {name}", simulated)]
            largest = max(differences(real, simulated).items(), key=lambda item: abs(item[1]))
            if asleep is sleeping:
                worst = max(worst, (f"{largest[0]}, {name}", largest[1]), key=lambda pair: abs(pair[1]))
            else:
                beyond = f"{largest[0]} {100 * largest[1]:+.0f} %"
    sections = [
        f"{TRIALS_REAL} trials, {HOSTS_REAL} hosts that sleep {sleeping.advance} s to advance (2, 4, 8 batched: times "
        f"{', '.join(map(str, sleeping.batched))}) and {sleeping.score} s to score, 10 validations, two batch keys:",
        table(HEADING, rows),
        f"Largest difference: {worst[0]}, {100 * worst[1]:+.1f} %. With an eighth of the sleep, requests take about as "
        f"long as Ray and MLflow do, whose threads then wait for each other in ways that are not simulated: {beyond}. "
        f"For the same reason, the times of fast hosts below are lower bounds.",
    ]
    return *worst, sections


def predict(times: Times, validations: int) -> list[str]:
    """Simulate 1,000 trials, with these times and with faster parts; return the report's sections."""
    fast = replace(times, advance=times.advance / 10, score=times.score / 10)
    faster_log = times.log / 4
    scenarios = {
        "digits, max_batch 8": (times, 8),
        "digits, max_batch 1": (times, 1),
        "MLflow 4 times as fast": (replace(times, log=faster_log), 8),
        "hosts 10 times as fast": (fast, 8),
        "hosts 10 times, MLflow 4 times as fast": (replace(fast, log=faster_log), 8),
    }
    large = Load(TRIALS, validations=validations, keys=8)
    outcomes = {name: Simulation(large, at, HOSTS, max_batch).run() for name, (at, max_batch) in scenarios.items()}
    return [
        f"{TRIALS:,} trials, {HOSTS} hosts, {validations} validations, 8 batch keys, simulated:",
        table(HEADING, [_row(name, outcome) for name, outcome in outcomes.items()]),
        "Bottlenecks: " + "; ".join(f"{name}: {bottleneck(outcome)}" for name, outcome in outcomes.items()) + ".",
    ]


def measured(times: Times, alone: float, queue: dict[int, float], validate_every: int) -> str:
    """The table of parameters."""
    return table(
        ["parameter", "measured"],
        [
            ["router, CPU ms per request", f"{1000 * times.router:.2f}"],
            ["a single request, answered at once, ms", f"{1000 * alone:.1f}"],
            *(
                [f"router without Ray, {n} waiting, {HOSTS} hosts, CPU ms per answer", f"{1000 * s:.2f}"]
                for n, s in queue.items()
            ),
            ["MLflow (SQLite), ms per log", f"{1000 * times.log:.1f}"],
            [f"digits, NFE 8: {validate_every} iterations on one core, s", f"{times.advance:.2f}"],
            ["2, 4, 8 trials batched, times that", ", ".join(f"{factor:.2f}" for factor in times.batched)],
            ["digits, NFE 8: scoring 1,024 pairs, s", f"{times.score:.2f}"],
        ],
    )


@command(__doc__)
@click.option("--tolerance", default=0.2, help="Largest relative difference between real and simulated.")
@click.option("--validations", default=15, help="Validations of each of the 1,000 trials.")
@click.option("--validate-every", default=100, help="Iterations between validations.")
@results_option
def main(tolerance: float, validations: int, validate_every: int, results: Path) -> None:
    """Measure, check, predict."""
    import ray

    load_before = load()
    queue = {count: seconds_of_queue(count, HOSTS) for count in (0, 100, 300, 900)}
    digits = digits_times(validate_every)
    start_ray(cpus=2)
    router, alone = router_seconds()
    parts = {"router": router, "wire": max(0.0, alone - router)}
    with tempfile.TemporaryDirectory() as folder:
        parts["log"] = Logger(folder, TRIALS_REAL).seconds()
    name, difference, checked = check(Times(advance=0.4, score=0.1, batched=(1.2, 1.6, 2.4), **parts))
    ray.shutdown()
    times = replace(digits, **parts)
    publish(
        results,
        "simulated-pool",
        f"{TRIALS:,} trials on {HOSTS} hosts, simulated",
        [measured(times, alone, queue, validate_every), *checked, *predict(times, validations)],
        quick=False,
        load_before=load_before,
    )
    if abs(difference) > tolerance:
        raise click.ClickException(f"{name} differs by {100 * difference:+.1f} %, more than {100 * tolerance:g} %")


if __name__ == "__main__":
    main()
