"""A sweep whose trials share hosts, against one process a trial that loads its own model.

The trials are distillations of BNS by Adam on a model of digits (NFE 8; learning rates times sigma0), their pairs made
beforehand. The pool's way is the product's whole sweep: Ray, 2 hosts, a router, Ray Tune, MLflow, report. The other way
starts one Python process a trial, two at a time, which loads the model itself and does the same distillation,
validation and test through LocalPool, without Ray, Tune, MLflow or a report. Both ways find the same PSNRs, which is
checked. Times are wall times from the start of the first process to the end of the last; a memory watch runs beside
both.

Both ways are run with the model as it is, and with a stand-in for a large one (benchmarks/adapters/large_zoo.py): its
constructor sleeps for --load-seconds, and it holds --weights-mb of weights that it does not use. Only loading and
memory are those of a large model, the work is not.

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
PEAKS = """Peaks in 2^20 bytes, looked for about once a second: of the largest process of a kind, and of all together.
PSS counts a page that several processes share in parts, private only pages that none shares. 'Ray's own' are its
daemons and the workers that it keeps in store."""
IMPORTS = "A process that imports what a trial of the pool does, then what a runner does, and nothing else:"


@dataclass(frozen=True)
class Model:
    """A model by a name for the tables, and what the stand-in is told."""

    name: str
    load_seconds: float
    weights_mb: int


@dataclass
class Run:
    """One way of running all trials, once.

    Attributes:
        seconds: Wall time.
        psnr_db: Best validation PSNR of every trial, sorted.
        total_pss: The most that all its processes held at once, bytes.
        roles: Peaks by role of process.
        answers: What the processes themselves reported.
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
    """The configuration of the sweep: ``trials`` distillations, and nothing else."""
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
        # and the defaults, as sweeps/configs/digits.yaml
        "resources": {"hosts": 2, "local_cpus": 2, "trial_cpus": trial_cpus},
        "storage": str(storage),
    }


class Job:
    """A process of :mod:`sharing_job`, started."""

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
        """What it found; waits for its end."""
        if self.process.wait():
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise click.ClickException(f"the {self.kind} process ended with {self.process.returncode}:\n{tail}")
        return json.loads(Path(f"{self.file}.out").read_text(encoding="utf-8"))


def shared(content: dict[str, Any], folder: Path) -> Run:
    """All trials on the pool's hosts."""
    begin = time.perf_counter()
    job = Job("sweep", {"config": content}, folder / "sweep.json")
    with MemoryWatch(job.process.pid) as watch:
        answer = job.answer()
        seconds = time.perf_counter() - begin
    return Run(seconds, sorted(answer["psnr_db"]), watch.total_pss, dict(watch.roles), [answer])


def separate(content: dict[str, Any], trials: int, folder: Path) -> Run:
    """Every trial in a process of its own, :data:`AT_ONCE` at a time."""
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
    """Refuse to compare what is not the same work."""
    first = runs[0].psnr_db
    for run in runs:
        # Not to the bit: where tensors lie in memory moves the rounding of float32 products.
        same = len(run.psnr_db) == len(first) and all(
            abs(a - b) < SAME_DB for a, b in zip(run.psnr_db, first, strict=True)
        )
        if not same:
            raise click.ClickException(f"the two ways did not find the same PSNRs: {first} and {run.psnr_db} dB")


@command(__doc__)
@click.option("--trials", default=16, help="Distillations in the sweep; a multiple of 2.")
@click.option("--iterations", default=300, help="Iterations of Adam in each.")
@click.option("--train", default=520, help="Training pairs.")
@click.option("--validation", default=1024, help="Validation pairs, and as many test pairs.")
@click.option("--load-seconds", default=10.0, help="How long the large model takes to load.")
@click.option("--weights-mb", default=256, help="Weights of the large model, 2^20 bytes.")
@click.option("--trial-cpus", default=0.125, help="What a trial of the pool takes: at 0.25 half as many run at once.")
@click.option("--rounds", default=3, help="Times everything is run, in turns.")
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
        made = root / "made"
        base = experiment(models[0], made, trials, iterations, pairs, trial_cpus)
        Job("pairs", {"config": base}, root / "pairs.json").answer()
        imports = Job("imports", {}, root / "imports.json").answer()
        progress.update()
        for index in range(rounds):
            for model in models:
                for way in ("pool", "processes"):
                    folder = Path(shutil.copytree(made, root / f"{index}-{model.weights_mb}-{way}"))
                    content = experiment(model, folder, trials, iterations, pairs, trial_cpus)
                    run = shared(content, folder) if way == "pool" else separate(content, trials, folder)
                    runs.setdefault((model.name, way), []).append(run)
                    shutil.rmtree(folder)
                    progress.update()
    check_same([run for several in runs.values() for run in several])
    note = (
        f"{trials} trials of {iterations} iterations; {train} training, {validation} validation and {validation} test "
        f"pairs;\n2 hosts and up to {1 / trial_cpus:g} trials at once against {AT_ONCE} processes at once; {rounds} "
        f"round(s). The large stand-in sleeps\n{load_seconds:g} s while it loads and holds {weights_mb} MB more. PSNRs "
        f"of all runs are the same within {SAME_DB:g} dB."
    )
    title = "Trials that share hosts, against one process a trial"
    sections = [note, time_table(runs, models), start_up(runs, models, imports["steps"]), PEAKS]
    sections += [memory_table(runs, models), IMPORTS, import_table(runs, models, imports["steps"])]
    publish(results, "sharing", title, sections, quick=quick, load_before=load_before)


def time_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        pool, processes = (runs[model.name, way] for way in ("pool", "processes"))
        ratios = [own.seconds / of_pool.seconds for own, of_pool in zip(processes, pool, strict=True)]
        seconds = (statistics.median(run.seconds for run in several) for several in (pool, processes))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([model.name, *(f"{value:.1f}" for value in seconds), f"{statistics.median(ratios):.2f} x", spread])
    return table(["model", "shared hosts, s", "one process a trial, s", "processes / shared", "over the rounds"], rows)


def start_up(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model], steps: list[dict[str, Any]]) -> str:
    """What of the times is start-up."""

    def median(model: Model, way: str, key: str) -> float:
        return statistics.median(answer[key] for run in runs[model.name, way] for answer in run.answers)

    first = models[0]
    loads = ", ".join(f"{median(m, 'processes', 'load_seconds'):.1f} s ({m.name})" for m in models)
    return (
        f"Of this, once a sweep: {sum(step['seconds'] for step in steps):.1f} s of imports in a process by itself and "
        f"{median(first, 'pool', 'ray_seconds'):.1f} s to start Ray. Once a trial without a pool: "
        f"{median(first, 'processes', 'import_seconds'):.1f} s of\nimports and {loads} to load the model."
    )


def memory_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model]) -> str:
    """Peaks over all rounds; a role's bytes are of one process of it."""
    rows: list[list[str]] = []
    for model in models:
        for way in ("pool", "processes"):
            several = runs[model.name, way]
            total = max(run.total_pss for run in several)
            rows.append([model.name, way, "all together", "", "", f"{total / MB:.0f}", ""])
            for role in ("driver", "router", "runner", "host", "trial", RAY, "other"):
                seen = [run.roles[role] for run in several if role in run.roles]
                if not seen:
                    continue
                peaks = [max(getattr(one, name) for one in seen) for name in ("rss", "pss", "private")]
                shown = "trial, model and all" if way == "processes" else role
                count = max(one.count for one in seen)
                rows.append([model.name, way, shown, str(count), *(f"{peak / MB:.0f}" for peak in peaks)])
    return table(["model", "way", "process", "at once", "RSS, MB", "PSS, MB", "private, MB"], rows)


def import_table(runs: dict[tuple[str, str], list[Run]], models: Sequence[Model], steps: list[dict[str, Any]]) -> str:
    """What a trial and a runner hold from their imports alone, in the order in which they are made here."""
    # Trials shorter than the interval between looks may go unseen.
    seen = [run.roles["trial"].private for run in runs[models[0].name, "pool"] if "trial" in run.roles]
    rows = [
        [
            step["module"],
            f"{step['seconds']:.1f}",
            f"{step['rss'] / MB:.0f}",
            f"{step['private'] / MB:.0f}",
            f"{100 * step['private'] / max(seen):.0f} %" if seen else "",
        ]
        for step in steps
    ]
    return table(["imported, up to", "seconds", "RSS, MB", "private, MB", "share of a trial's peak"], rows)


if __name__ == "__main__":
    main()
