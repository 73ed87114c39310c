"""Ground-truth pairs made by the product, against a bare torchdiffeq loop.

The product draws noise and labels, solves, and writes Parquet shards and the manifest: in this process (LocalPool), and
through the router and Ray actors (RayPool, 1 and 2 hosts). The bare loop has noise and labels in memory already and
stores nothing. Batches, tolerances, norm and last step are the same; the benchmark checks that the samples are, too. A
pool of n hosts is compared with n processes that run the bare loop at the same time, so that both use the same cores.
The time to load the model is not included, and all processes run at one priority.

Seconds are affected by other work of the machine; CPU seconds (of driver, hosts and router) much less.

python benchmarks/bench_pairs.py
python benchmarks/bench_pairs.py --pairs 512 --tolerance 1e-5 --rounds 5
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import click
import ray
import torch
from processes import SAME_PRIORITY, cpu_seconds
from publishing import command, load, publish, quick_option, results_option, table
from timing import interleaved_rounds, paired_ratio
from torch import Tensor
from torchdiffeq import odeint

from orchestrator import plugins
from orchestrator.cluster.connect import connect
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.ground_truth import FIRST_STEP, SAFETY, largest_sample_rms
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool, Pool, PoolSettings, Request
from orchestrator.progress import bar
from orchestrator.randomness import noise
from orchestrator.storage import Storage

MODEL = "digits_fm_ot"
HOSTS = (1, 2)


class BareLoop:
    """torchdiffeq over some shards of a spec, with noise and labels drawn beforehand."""

    def __init__(self, spec: PairSpec, shards: list[int]):
        self.model = ZooModel(MODEL)
        torch.set_num_threads(1)  # like a host
        self.tolerances = {"rtol": spec.rtol, "atol": spec.atol}
        conditioning = plugins.build("datasets", spec.conditioning["name"], spec.conditioning["options"])
        self.batches = [
            (
                torch.from_numpy(noise(spec.seed, batch, spec.shape)).double(),
                torch.from_numpy(conditioning.conditions(spec.seed, list(batch))),
            )
            for shard in shards
            for batch in spec.batches(spec.shard_indices(shard))
        ]

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """x(1) of every batch, float64."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        options = {
            "norm": largest_sample_rms,
            "step_t": ends[1:],
            "first_step": torch.tensor(FIRST_STEP, dtype=torch.float64),
            "safety": SAFETY,
        }
        net = self.model.net

        def solved(x0: Tensor, label: Tensor) -> Tensor:
            def velocity(t: Tensor, x: Tensor) -> Tensor:
                return net(x.float(), t.float().expand(len(x)), label).double()

            return odeint(velocity, x0, ends, **self.tolerances, method="dopri5", options=options)[-1]

        return [solved(x0, label) for x0, label in self.batches]


def _bare_process(connection: Connection, spec: PairSpec, shards: list[int]) -> None:
    """Run the bare loop once per 'go' received, until any other message."""
    loop = BareLoop(spec, shards)
    connection.send("ready")
    with suppress(EOFError):  # the parent process is gone
        while connection.recv() == "go":
            loop.run()
            connection.send("done")


class BareProcesses:
    """``count`` processes that run the bare loop, each on its part of the shards. A context manager."""

    def __init__(self, spec: PairSpec, count: int):
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], []
        for first in range(count):
            ours, theirs = context.Pipe()
            shards = list(range(first, spec.shards, count))
            process = context.Process(target=_bare_process, args=(theirs, spec, shards), daemon=True)
            process.start()
            theirs.close()  # otherwise recv() would wait forever for a process that died
            self.processes.append(process)
            self.connections.append(ours)

    def __enter__(self) -> BareProcesses:
        for connection in self.connections:
            connection.recv()
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self.connections:
            connection.send("stop")
        for process in self.processes:
            process.join()

    def run(self) -> None:
        for connection in self.connections:
            connection.send("go")
        for connection in self.connections:
            connection.recv()


def pair_spec(facts: ModelFacts, pairs: int, batch: int, tolerance: float) -> PairSpec:
    """A spec whose shards can be divided equally among the hosts."""
    if pairs % (2 * max(HOSTS) * batch):
        raise click.BadParameter(
            f"--pairs {pairs} is not a multiple of {2 * max(HOSTS)} x --batch {batch}: every host must get the same "
            f"number of whole batches, in two shards"
        )
    return PairSpec(
        model_digest=facts.digest,
        conditioning={"name": "labels", "options": {"classes": 10}},
        content=plugins.build("datasets", "labels").content,
        guidance_scale=1.0,
        shape=facts.shape,
        seed=0,
        count=pairs,
        batch_size=batch,
        shard_size=pairs // (2 * max(HOSTS)),
        rtol=tolerance,
        atol=tolerance,
        device_class=facts.device_class,
    )


def making(pool: Pool, storage: Storage, spec: PairSpec) -> Callable[[], None]:
    """A function that makes the whole store again: every shard and the manifest."""
    store = PairStore(storage, spec)
    requests = [
        Request.of(HostProtocol.make_shard, spec=spec, first=indices.start, stop=indices.stop)
        for indices in spec.gaps([])
    ]

    def make() -> None:
        shutil.rmtree(storage.path(store.folder), ignore_errors=True)
        store.commit(pool.gather(requests))

    return make


def check_same(bare: list[Tensor], store: PairStore) -> None:
    """Check that both sides made the same samples, up to rounding."""
    difference = float((torch.cat(bare).float() - store.load().x1).abs().max())
    if difference > 1e-4:
        raise click.ClickException(f"the bare loop and the product differ by {difference:.1e}: not the same work")


def with_cpu_seconds(run: Callable[[], object], spent: list[float]) -> Callable[[], None]:
    """``run``, appending to ``spent`` the CPU seconds that this process and its descendants took for it."""

    def measured() -> None:
        before = cpu_seconds(os.getpid())
        run()
        spent.append(cpu_seconds(os.getpid()) - before)

    return measured


@command(__doc__)
@click.option("--pairs", default=1024, help="Pairs per round.")
@click.option("--batch", default=64, help="Pairs per batch.")
@click.option("--tolerance", default=1e-6, help="rtol and atol of dopri5.")
@click.option("--rounds", default=9, help="Runs of each alternative, in turns.")
@quick_option
@results_option
def main(pairs: int, batch: int, tolerance: float, rounds: int, quick: bool, results: Path) -> None:
    load_before = load()
    if quick:
        pairs, rounds = min(pairs, 256), min(rounds, 3)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        storage = Storage.at(folder)
        settings = HostSettings(adapter="zoo", options={"weights": MODEL}, storage=storage.root, threads=1)
        local = LocalPool(Host(settings))
        spec = pair_spec(local.call(Request.of(HostProtocol.facts)), pairs, batch, tolerance)
        os.environ.update(SAME_PRIORITY)
        connect(None, max(HOSTS))
        stack.callback(ray.shutdown)
        loop = BareLoop(spec, list(range(spec.shards)))
        alternatives: dict[str, Callable[[], object]] = {
            "bare loop, this process": loop.run,
            "LocalPool": making(local, storage, spec),
        }
        for hosts in HOSTS:
            bare = stack.enter_context(BareProcesses(spec, hosts))
            pool = RayPool.start(f"bench-{hosts}", Host, settings, PoolSettings(hosts=hosts, cpus=1 / 2))
            alternatives[f"bare loop, {hosts} process(es)"] = bare.run
            alternatives[f"RayPool, {hosts} host(s)"] = making(pool, storage, spec)
        spent: dict[str, list[float]] = {name: [] for name in alternatives}
        measured = {name: with_cpu_seconds(run, spent[name]) for name, run in alternatives.items()}
        with bar(len(alternatives) * (rounds + 1), "run", "pairs") as progress:
            seconds = interleaved_rounds(measured, rounds, tick=progress.update)
        store = PairStore(storage, spec)
        check_same(loop.run(), store)
        nfe = [record.nfe_sum / record.rows for record in store.records()]
    names = list(alternatives)
    rows = []
    for bare_name, name in zip(names[::2], names[1::2], strict=True):
        for alternative in (bare_name, name):
            median = statistics.median(seconds[alternative])
            share = paired_ratio(seconds[bare_name], seconds[alternative])
            cpu = statistics.median(spent[alternative][1:])  # the first is the warm-up
            cpu_share = paired_ratio(spent[bare_name][1:], spent[alternative][1:])
            cells = [f"{median:.2f}", f"{pairs / median:.0f}", f"{100 * share:.1f} %"]
            rows.append([alternative, *cells, f"{cpu:.2f}", f"{100 * cpu_share:.1f} %"])
    note = (
        f"{pairs} pairs of {MODEL} in {spec.shards} shards, batches of {batch}, tolerance {tolerance:g}, "
        f"{statistics.mean(nfe):.0f} evaluations per pair; medians of {rounds} interleaved rounds.\nShares "
        f"are medians over rounds of the product's throughput (pairs per second, pairs per CPU second) over that of\n"
        f"the bare loop above it, with the same number of processes."
    )
    heading = ["", "seconds", "pairs / s", "share of the bare loop's", "CPU seconds", "share of the bare loop's"]
    title = "Pair generation against a bare torchdiffeq loop"
    publish(results, "pairs", title, [note, table(heading, rows)], quick=quick, load_before=load_before)


if __name__ == "__main__":
    main()
