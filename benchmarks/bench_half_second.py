"""A distillation of a model of 10^6 dimensions and half a second per call: what happens between calls, and memory.

The network is a closed form that sleeps (adapters/half_second.py); a call takes the same time for any batch. Per kind
of request to the host: calls of the network, the wall time of all calls, the time between them as a share of the whole,
the CPU time between them as a share of the whole (which other work of the machine does not affect), and the peak of
resident memory above that before the distillation. "Commands" is everything outside of the host. Linux only.

python benchmarks/bench_half_second.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from memory_case import status
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator.config.base import PluginConfig
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.importing import import_factory
from orchestrator.pool.requests import LocalPool, Outcome, R, Request
from orchestrator.storage import Storage
from sweeps.distil.outcome import DistilOutcome
from sweeps.distil.place import Place
from sweeps.distil.recipe import distil
from sweeps.distil.settings import DistilSettings

ADAPTERS = Path(__file__).parent / "adapters"
MB = 10**6


@dataclass
class Spent:
    """Time of one kind of request, and the peak of resident memory during it."""

    requests: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0


class MeasuredPool(LocalPool):
    """Measures each request; ``meter`` is that of the network."""

    def __init__(self, host: Host, meter: Any):
        super().__init__(host)
        self.meter = meter
        self.baseline = status("VmRSS")
        self.spent: dict[str, Spent] = {}

    def map(self, requests: Iterable[Request[R]]) -> Iterator[Outcome[R]]:
        for index, request in enumerate(requests):
            spent = self.spent.setdefault(request.method, Spent())
            before, wall, cpu = asdict(self.meter), time.perf_counter(), time.process_time()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            outcomes = [replace(outcome, index=index) for outcome in super().map([request])]
            spent.requests += 1
            spent.wall += time.perf_counter() - wall
            spent.cpu += time.process_time() - cpu
            spent.calls += self.meter.calls - before["calls"]
            spent.seconds += self.meter.seconds - before["seconds"]
            spent.cpu_seconds += self.meter.cpu_seconds - before["cpu_seconds"]
            spent.peak = max(spent.peak, status("VmHWM") - self.baseline)
            yield from outcomes


def place_of(root: Path, dimensions: int, duration: float, memory_gb: float) -> Place:
    """A host of the network in this process."""
    options = {
        "factory": "half_second:HalfSecond",
        "kwargs": {"duration": duration},
        "path": str(ADAPTERS),
        "shape": [dimensions],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "call": "x, t",
    }
    storage = Storage.at(root)
    memory_bytes = int(memory_gb * 1e9)
    host = Host(HostSettings(adapter="torch_module", options=options, storage=storage.root, memory_bytes=memory_bytes))
    meter = import_factory("half_second:HalfSecond", str(ADAPTERS)).meter
    return Place(
        pool=MeasuredPool(host, meter),
        storage=storage,
        facts=host.facts(),
        conditioning=PluginConfig(name="labels", options={"classes": 1}),
        memory_bytes=memory_bytes,
        force=True,
    )


def rows_of(spent: dict[str, Spent], wall: float, cpu: float) -> list[list[str]]:
    """A row for each kind of request, for the commands, and for all."""
    sums = Spent(
        requests=sum(one.requests for one in spent.values()),
        wall=wall,
        cpu=cpu,
        calls=sum(one.calls for one in spent.values()),
        seconds=sum(one.seconds for one in spent.values()),
        cpu_seconds=sum(one.cpu_seconds for one in spent.values()),
        peak=max(one.peak for one in spent.values()),
    )
    commands = Spent(
        wall=wall - sum(one.wall for one in spent.values()), cpu=cpu - sum(one.cpu for one in spent.values())
    )
    return [
        [
            name,
            str(one.requests),
            str(one.calls),
            f"{one.seconds:.1f}",
            f"{(one.wall - one.seconds) / wall:.1%}",
            f"{(one.cpu - one.cpu_seconds) / wall:.1%}",
            f"{one.peak / MB:,.0f}" if one.peak else "",
        ]
        for name, one in [*spent.items(), ("commands", commands), ("all", sums)]
    ]


@command(__doc__)
@click.option("--dimensions", default=10**6, help="Numbers of a sample.")
@click.option("--duration", default=0.5, help="Seconds of a call.")
@click.option("--nfe", default=8, help="Evaluations per sample.")
@click.option("--budget", default=8000, help="Velocity evaluations, each of one sample.")
@click.option("--memory-gb", default=1.0, help="Memory of a host's distillation step, 10^9 bytes.")
@quick_option
@results_option
def main(dimensions: int, duration: float, nfe: int, budget: int, memory_gb: float, quick: bool, results: Path) -> None:
    load_before = load()
    torch.set_num_threads(1)
    if quick:
        dimensions, duration = dimensions // 10, duration / 10
    with tempfile.TemporaryDirectory() as root:
        place = place_of(Path(root), dimensions, duration, memory_gb)
        assert isinstance(place.pool, MeasuredPool)
        begin, cpu = time.perf_counter(), time.process_time()
        outcome: DistilOutcome = distil(place, DistilSettings(nfe=(nfe,), budget=budget))
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    (result,) = outcome.results.values()
    cost = outcome.bill.total().cost
    assert cost is not None
    heading = ["request", "requests", "calls", "seconds in calls", "between calls", "CPU between calls", "peak, MB"]
    sections = [
        f"{dimensions:,} dimensions, {duration:g} s per call, NFE {nfe}, {memory_gb:g} GB for a distillation step: "
        f"{result.psnr_db:.1f} dB (best fixed solver {result.best_fixed_psnr_db:.1f} dB) for {cost.evaluations:,} "
        f"velocity evaluations in {wall:.0f} s. Shares are of this time.",
        table(heading, rows_of(place.pool.spent, wall, cpu)),
    ]
    publish(results, "half-second", "A model of half a second per call", sections, quick=quick, load_before=load_before)


if __name__ == "__main__":
    main()
