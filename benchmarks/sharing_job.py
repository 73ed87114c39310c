"""Processes that bench_sharing.py starts: python sharing_job.py sweep|trial|pairs|imports FILE.

``sweep`` runs all trials as the product does (hosts, Ray Tune, MLflow, report). ``trial`` runs one of them by itself,
on a model that it loads. ``pairs`` makes the pairs for both. ``imports`` only imports the modules of a trial and of a
runner. FILE is JSON: the experiment's configuration and, for a trial, the index of its point. Each writes its report to
FILE.out.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.requests import Request

ADAPTERS = str(Path(__file__).parent / "adapters")


def find_adapters() -> None:
    """Add the benchmarks' model adapters to those of the product, in this process."""
    import orchestrator.models

    if ADAPTERS not in orchestrator.models.__path__:
        orchestrator.models.__path__.append(ADAPTERS)


def sweep(job: dict[str, Any]) -> dict[str, Any]:
    """Run the whole sweep; report the best validation PSNR of each point."""
    import ray

    from orchestrator.config.reading import parse_config
    from orchestrator.pool.client import NAMESPACE
    from orchestrator.results.store import ResultStore
    from orchestrator.storage import Storage
    from sweeps.sweep import run_sweep

    find_adapters()
    config = parse_config(job["config"], "the benchmark's configuration")
    config.check()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    begin = time.perf_counter()
    # As in orchestrator.cluster.connect.connect, with a hook that makes the adapters available to the workers.
    ray.init(
        address="local",
        num_cpus=config.resources.cpu_budget,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"worker_process_setup_hook": find_adapters},
    )
    ray_seconds = time.perf_counter() - begin
    outcome = run_sweep(config, address=None, wait=False, announce=lambda sentence: None)
    if outcome.failed:
        raise RuntimeError(f"trials failed: {outcome.failed}")
    storage = Storage.at(config.storage)
    results = [ResultStore(storage, key).load() for key in storage.names("points")]
    return {"psnr_db": [result.validation_psnr_db for result in results], "ray_seconds": ray_seconds}


def trial(job: dict[str, Any]) -> dict[str, Any]:
    """Run the trial of point ``index`` with the same requests as in the sweep, to a host in this process."""
    begin = time.perf_counter()
    from orchestrator.config.pair_plan import pair_specs
    from orchestrator.hosts.distillation import validate
    from orchestrator.pool.requests import LocalPool
    from orchestrator.results.scoring import evaluate
    from sweeps.space import learned_points

    find_adapters()
    config, settings = _configured(job)
    imports = time.perf_counter() - begin
    pool = LocalPool(Host(settings))
    loaded = time.perf_counter() - begin - imports
    facts = pool.call(Request.of(HostProtocol.facts))
    specs = pair_specs(config, facts)
    point = learned_points(config, specs, {}, facts.scheduler)[job["index"]]
    learned = point.run
    scheduler = facts.scheduler
    start = point.start.solver(point.nfe, point.sigma0)

    state = learned.method.begin(learned.build().start(start, scheduler))
    state = validate(learned, state, point.validation, scheduler, pool.gather)
    while state.status == "running":
        step = Request.of(
            HostProtocol.advance, run=learned, state=state, steps=point.validate_every, validation=point.validation
        )
        state = pool.call(step)
    best = learned.solver(state.best["parameters"], scheduler)
    for solver in (best, start.to_ns(scheduler)):
        evaluate(pool, solver, point.test, point.metrics)
    return {"psnr_db": state.best["psnr_db"], "import_seconds": imports, "load_seconds": loaded}


def pairs(job: dict[str, Any]) -> dict[str, Any]:
    """Make the pairs of the experiment."""
    from orchestrator.config.pair_plan import pair_specs
    from orchestrator.pairs.make import ensure_pairs
    from orchestrator.pool.requests import LocalPool
    from orchestrator.storage import Storage

    find_adapters()
    config, settings = _configured(job)
    pool = LocalPool(Host(settings))
    specs = list(pair_specs(config, pool.call(Request.of(HostProtocol.facts))).values())
    ensure_pairs(Storage.at(config.storage), specs, pool, wait=False, announce=lambda sentence: None)
    return {}


def imports(job: dict[str, Any]) -> dict[str, Any]:
    """Report the cumulative memory and the seconds of each large import of a trial, then of a runner."""
    from processes import memory

    steps = []
    for module in ("ray.tune", "sweeps.points.trial", "torch", "mlflow", "sweeps.points.runner"):
        begin = time.perf_counter()
        importlib.import_module(module)
        held = memory(os.getpid())
        assert held is not None
        steps.append(
            {"module": module, "seconds": time.perf_counter() - begin, "rss": held.rss, "private": held.private}
        )
    return {"steps": steps}


def _configured(job: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the settings of its hosts."""
    from orchestrator.config.reading import parse_config
    from orchestrator.hosts.settings import HostSettings

    config = parse_config(job["config"], "the benchmark's configuration")
    settings = HostSettings(adapter=config.model.name, options=dict(config.model.options), storage=config.storage)

    return config, settings


JOBS = {"sweep": sweep, "trial": trial, "pairs": pairs, "imports": imports}

if __name__ == "__main__":
    file = Path(sys.argv[2])
    report = JOBS[sys.argv[1]](json.loads(file.read_text(encoding="utf-8")))
    Path(f"{file}.out").write_text(json.dumps(report), encoding="utf-8")
