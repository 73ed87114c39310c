"""A sweep whose trials share hosts, against one process per trial that loads its own model.

The trials are distillations of BNS by Adam on a model of digits (NFE 8; learning rates times sigma0), with pairs made
beforehand. With the pool, they run as the product's whole sweep: Ray, 2 hosts, a router, Ray Tune, MLflow, report.
Without it, each trial is a Python process, two at a time, which loads the model itself and does the same distillation,
validation and test through LocalPool, without Ray, Tune, MLflow or a report. The benchmark checks that both ways end at
the same PSNRs. Times are wall times from the start of the first process to the end of the last; memory is sampled
meanwhile.

Both ways run with the model as it is, and with a stand-in for a large one (benchmarks/adapters/large_zoo.py): its
constructor sleeps for --load-seconds, and it holds --weights-mb of unused weights. Only loading time and memory are
those of a large model, the work is not.

python benchmarks/bench_sharing.py
python benchmarks/bench_sharing.py --trials 8 --load-seconds 20 --rounds 1
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from processes import RAY, SAME_PRIORITY, MemoryWatch, RolePeak
from publishing import command, load, publish, quick_option, results_option, table

from orchestrator.progress import bar

JOB = Path(__file__).parent / "sharing_job.py"
AT_ONCE = 2
SIGMA0 = (1.0, 1.5)
SAME_DB = 0.01
MB = 2**20
PEAKS = """Peaks in 2^20 bytes, sampled about once a second: of the largest process of a kind, and of all processes.
PSS divides a page among the processes that use it; private counts only pages that one process uses. 'Ray's own' are its
daemons and idle workers."""
IMPORTS = "A process that only imports the modules of a trial of the pool, then those of a runner:"


@dataclass(frozen=True)
class Model:
    """A model: its name in tables, and the options of the stand-in."""

    name: str
    load_seconds: float
    weights_mb: int


@dataclass
class Run:
    """One run of all trials, in one of the two ways.

    Attributes:
        seconds: Wall time.
        psnr_db: Best validation PSNR of every trial, sorted.
        total_pss: Peak of all its processes, bytes.
        roles: Peaks by role of process.
        answers: Reports of the processes themselves.
    """

    seconds: float
    psnr_db: list[float]
    total_pss: int
    roles: dict[str, RolePeak]
    answers: list[dict[str, Any]] = field(default_factory=list)


def experiment(
    model: Model,
    storage: Path,
    trials: int,
    iterations: int,
    pairs: tuple[int, int, int],
    trial_cpus: float = 0.125,
) -> dict[str, Any]:
    """The configuration of a sweep of ``trials`` distillations and nothing else."""
    if trials % len(SIGMA0):
        raise click.BadParameter(f"--trials must be a multiple of {len(SIGMA0)}, got {trials}")
    rates = [1e-3 * 1.15**step for step in range(trials // len(SIGMA0))]
    train, validation, test = pairs
    return {
        "name": "sharing",
        "model": {
            "name": "large_zoo",
            "options": {
                "weights": "digits_fm_ot",
                "load_seconds": model.load_seconds,
                "weights_mb": model.weights_mb,
            },
        },
        "conditioning": {"name": "labels", "options": {"classes": 10}},
        "pairs": {"train": train, "validation": validation, "test": test},
        "nfe": [8],
        "fixed": [],
        "learned": [
            {
                "family": "bns",
                "start": ["midpoint"],
                "sigma0": list(SIGMA0),
                "learning_rate": rates,
                "iterations": iterations,
                "batch_size": 40,
                "validate_every": 50,
            }
        ],
        # otherwise the defaults, as in sweeps/configs/digits.yaml
        "resources": {"hosts": 2, "local_cpus": 2, "trial_cpus": trial_cpus},
        "storage": str(storage),
    }


class Job:
    """A running process of :mod:`sharing_job`."""

    def __init__(self, kind: str, content: dict[str, Any], file: Path):
        file.write_text(json.dumps(content), encoding="utf-8")
        self.kind, self.file = kind, file
        self.log = file.with_suffix(".log")
        limits = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(JOB), kind, str(file)],
                stdout=log,
                stderr=log,
                env=os.environ | SAME_PRIORITY | limits,
            )

    def answer(self) -> dict[str, Any]:
        """Wait for the process to end and return its report."""
        if self.process.wait():
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise click.ClickException(f"the {self.kind} process ended with {self.process.returncode}:\n{tail}")
        return json.loads(Path(f"{self.file}.out").read_text(encoding="utf-8"))


def run_sweep(content: dict[str, Any], folder: Path) -> Run:
    """Run all trials as one sweep, on the pool's hosts."""
    begin = time.perf_counter()
    job = Job("sweep", {"config": content}, folder / "sweep.json")
    with MemoryWatch(job.process.pid) as watch:
        answer = job.answer()
        seconds = time.perf_counter() - begin
    return Run(seconds, sorted(answer["psnr_db"]), watch.total_pss, dict(watch.roles), [answer])


def run_processes(content: dict[str, Any], trials: int, folder: Path) -> Run:
    """Run every trial in a process of its own, :data:`AT_ONCE` at a time."""
    begin = time.perf_counter()
    running: list[Job] = []
    answers = []
    with MemoryWatch(os.getpid()) as watch:
        waiting = iter(range(trials))
        index = next(waiting, None)
        while index is not None or running:
            while index is not None and len(running) < AT_ONCE:
                running.append(Job("trial", {"config": content, "index": index}, folder / f"trial-{index}.json"))
                index = next(waiting, None)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                answers.append(job.answer())
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
    own = watch.roles.pop("driver")  # this process, which only waits
    psnr = sorted(answer["psnr_db"] for answer in answers)
    return Run(seconds, psnr, watch.total_pss - own.pss, dict(watch.roles), answers)


def check_same(runs: Sequence[Run]) -> None:
    """Check that all runs ended at the same PSNRs, up to rounding."""
    first = runs[0].psnr_db
    for run in runs:
        # Not bit for bit: the rounding of float32 products depends on the memory alignment of tensors.
        same = len(run.psnr_db) == len(first) and all(
            abs(a - b) < SAME_DB for a, b in zip(run.psnr_db, first, strict=True)
        )
        if not same:
            raise click.ClickException(f"the two ways did not end at the same PSNRs: {first} and {run.psnr_db} dB")


@command(__doc__)
@click.option("--trials", default=16, help="Distillations in the sweep; a multiple of 2.")
@click.option("--iterations", default=300, help="Iterations of Adam per trial.")
@click.option("--train", default=520, help="Training pairs.")
@click.option("--validation", default=1024, help="Validation pairs, and as many test pairs.")
@click.option("--load-seconds", default=10.0, help="Time that the large model takes to load.")
@click.option("--weights-mb", default=256, help="Weights of the large model, 2^20 bytes.")
@click.option("--trial-cpus", default=0.125, help="CPUs per trial of the pool: at 0.25, half as many run at once.")
@click.option("--rounds", default=3, help="Runs of each alternative, in turns.")
@quick_option
@results_option
def main(
    trials: int,
    iterations: int,
    train: int,
    validation: int,
    load_seconds: float,
    weights_mb: int,
    trial_cpus: float,
    rounds: int,
    quick: bool,
    results: Path,
) -> None:
    load_before = load()
    if quick:
        trials, iterations, rounds = min(trials, 4), min(iterations, 50), 1
        train, validation, load_seconds = min(train, 64), min(validation, 64), min(load_seconds, 4.0)
    pairs = (train, validation, validation)
    models = [Model("as it is", 0.0, 0), Model("large stand-in", load_seconds, weights_mb)]
    runs: dict[tuple[str, str], list[Run]] = {}
    with tempfile.TemporaryDirectory() as name, bar(1 + 4 * rounds, "run", "sharing") as progress:
        root = Path(name)
        pairs_folder = root / "made"
        base = experiment(models[0], pairs_folder, trials, iterations, pairs, trial_cpus)
        Job("pairs", {"config": base}, root / "pairs.json").answer()
        imports = Job("imports", {}, root / "imports.json").answer()
        progress.update()
        for index in range(rounds):
            for model in models:
                for way in ("pool", "processes"):
                    folder = Path(shutil.copytree(pairs_folder, root / f"{index}-{model.weights_mb}-{way}"))
                    content = experiment(model, folder, trials, iterations, pairs, trial_cpus)
                    run = run_sweep(content, folder) if way == "pool" else run_processes(content, trials, folder)
                    runs.setdefault((model.name, way), []).append(run)
                    shutil.rmtree(folder)
                    progress.update()
    check_same([run for several in runs.values() for run in several])
    note = (
        f"{trials} trials of {iterations} iterations; {train} training, {validation} validation and {validation} test "
        f"pairs;\n2 hosts and up to {1 / trial_cpus:g} trials at once against {AT_ONCE} processes at once; {rounds} "
        f"round(s). The large stand-in sleeps\n{load_seconds:g} s while it loads and holds {weights_mb} MB more. PSNRs "
        f"of all runs are equal within {SAME_DB:g} dB."
    )
    title = "Trials that share hosts, against one process per trial"
    sections = [note, time_table(runs, models), start_up(runs, models, imports["steps"]), PEAKS]
    sections += [memory_table(runs, models), IMPORTS, import_table(runs, models, imports["steps"])]
    publish(results, "sharing", title, sections, quick=quick, load_before=load_before)


def time_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        pool_runs, process_runs = (runs[model.name, way] for way in ("pool", "processes"))
        ratios = [own.seconds / pool.seconds for own, pool in zip(process_runs, pool_runs, strict=True)]
        seconds = (statistics.median(run.seconds for run in several) for several in (pool_runs, process_runs))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([model.name, *(f"{value:.1f}" for value in seconds), f"{statistics.median(ratios):.2f} x", spread])
    return table(
        ["model", "shared hosts, s", "one process per trial, s", "processes / shared hosts", "over the rounds"], rows
    )


def start_up(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model], steps: list[dict[str, Any]]) -> str:
    """A sentence on the part of the times that is start-up."""

    def median(model: Model, way: str, key: str) -> float:
        return statistics.median(answer[key] for run in runs[model.name, way] for answer in run.answers)

    first = models[0]
    loads = ", ".join(f"{median(m, 'processes', 'load_seconds'):.1f} s ({m.name})" for m in models)
    return (
        f"Of this, once per sweep: {sum(step['seconds'] for step in steps):.1f} s of imports in a process by itself "
        f"and {median(first, 'pool', 'ray_seconds'):.1f} s to start Ray. Once per trial without a pool: "
        f"{median(first, 'processes', 'import_seconds'):.1f} s of\nimports and {loads} to load the model."
    )


def memory_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model]) -> str:
    """A table of peaks over all rounds; the bytes of a role are those of its largest process."""
    rows: list[list[str]] = []
    for model in models:
        for way in ("pool", "processes"):
            several = runs[model.name, way]
            total = max(run.total_pss for run in several)
            rows.append([model.name, way, "all processes", "", "", f"{total / MB:.0f}", ""])
            for role in ("driver", "router", "runner", "host", "trial", RAY, "other"):
                role_peaks = [run.roles[role] for run in several if role in run.roles]
                if not role_peaks:
                    continue
                peaks = [max(getattr(peak, name) for peak in role_peaks) for name in ("rss", "pss", "private")]
                label = "trial, with its model" if way == "processes" else role
                count = max(peak.count for peak in role_peaks)
                rows.append([model.name, way, label, str(count), *(f"{peak / MB:.0f}" for peak in peaks)])
    return table(["model", "way", "process", "at once", "RSS, MB", "PSS, MB", "private, MB"], rows)


def import_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model], steps: list[dict[str, Any]]) -> str:
    """A table of the memory of a trial's and a runner's imports, cumulative, in the order of import."""
    # Trials shorter than the sampling interval may be missed.
    private_peaks = [run.roles["trial"].private for run in runs[models[0].name, "pool"] if "trial" in run.roles]
    rows = [
        [
            step["module"],
            f"{step['seconds']:.1f}",
            f"{step['rss'] / MB:.0f}",
            f"{step['private'] / MB:.0f}",
            f"{100 * step['private'] / max(private_peaks):.0f} %" if private_peaks else "",
        ]
        for step in steps
    ]
    return table(["imported, up to", "seconds", "RSS, MB", "private, MB", "share of a trial's peak"], rows)


if __name__ == "__main__":
    main()
