"""Distillation without a backward pass against Adam: model evaluations and time to reach a validation PSNR.

python benchmarks/bench_distillation.py --nfe 8 --models digits_fm_ot --methods lm
python benchmarks/bench_distillation.py --methods lm,adam-published,adam-tuned --seeds 0,1,2 --guidance 1,3   # hours
"""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor

from orchestrator.host import HostSettings
from orchestrator.models.base import ModelAdapter
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool import LocalPool
from orchestrator.storage import Storage
from solvers import NSSolver
from solvers.distil import adam
from solvers.distil import levenberg_marquardt as lm
from solvers.distil.adam import AdamSettings, AdamState, LossAndGradient
from solvers.distil.least_squares import fit
from solvers.distil.levenberg_marquardt import LMSettings, LMState
from solvers.distil.normal_equations import Jacobian, NormalEquations, normal_equations
from solvers.distil.state import DistillationState
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.losses import per_sample_mse, psnr_db, psnr_loss

STARTS = {"euler": Euler(), "midpoint": Midpoint(), "ab2": AdamsBashforth(2), "ab3": AdamsBashforth(3)}
METHODS = ("lm", "adam-published", "adam-tuned")
LEARNING_RATES = {"adam-published": 5e-4, "adam-tuned": 5e-3}
RESULTS = Path(__file__).parent / "results"
SCORING_BATCH = 512


@dataclass(frozen=True)
class Task:
    """One model at one guidance scale, with its pairs."""

    model: ModelAdapter
    guidance_scale: float
    train: PairSet
    validation: PairSet

    @property
    def forwards(self) -> int:
        """Network forwards per velocity evaluation."""
        return self.model.forwards_per_evaluation(self.guidance_scale)

    def sample(self, solver: NSSolver, pairs: PairSet) -> Tensor:
        return solver.sample(self.model.field(pairs.condition, self.guidance_scale), pairs.x0)

    @torch.no_grad()
    def psnr(self, solver: NSSolver) -> float:
        """Mean PSNR on the validation pairs, dB."""
        parts = [
            self.validation.select(slice(first, first + SCORING_BATCH))
            for first in range(0, len(self.validation), SCORING_BATCH)
        ]
        mse = torch.cat([per_sample_mse(self.sample(solver, part), part.x1) for part in parts])
        return float(psnr_db(mse, self.model.data_range).mean())


@dataclass(frozen=True)
class Mark:
    """What a run had spent when it was validated: network forwards and backwards, and seconds without validation."""

    iteration: int
    psnr: float
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class Method:
    """A way of distilling: its start, and how a state is advanced and what it has spent."""

    begin: Callable[[Tensor], DistillationState]
    advance: Callable[[DistillationState, int], DistillationState]
    spent: Callable[[DistillationState], tuple[int, int]]
    validate_every: int


def levenberg_marquardt(task: Task, settings: LMSettings, memory_bytes: int) -> Method:
    def normal(solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
        pairs = task.train.select(indices)
        return normal_equations(
            solver,
            lambda rows: task.model.field(pairs.condition[rows], task.guidance_scale),
            pairs.x0,
            pairs.x1,
            memory_bytes=memory_bytes,
            jacobian=jacobian,
            free=free,
        )

    @torch.no_grad()
    def loss(solver: NSSolver, indices: list[int]) -> float:
        pairs = task.train.select(indices)
        return float(psnr_loss(task.sample(solver, pairs), pairs.x1).double().mean())

    def advance(state: DistillationState, steps: int) -> DistillationState:
        assert isinstance(state, LMState)
        return lm.advance(state, steps, settings, BNS(), task.model.scheduler, 1.0, normal, loss)

    def spent(state: DistillationState) -> tuple[int, int]:
        assert isinstance(state, LMState)
        return state.evaluations * task.forwards, 0

    return Method(lambda parameters: LMState.begin(parameters, settings), advance, spent, validate_every=1)


def adam_method(task: Task, nfe: int, settings: AdamSettings, validate_every: int) -> Method:
    def objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        pairs = task.train.select(indices)
        theta = solver.flat().requires_grad_()
        loss = psnr_loss(task.sample(NSSolver.from_flat(theta), pairs), pairs.x1).double().mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        return LossAndGradient(float(loss.detach()), gradient)

    def advance(state: DistillationState, steps: int) -> DistillationState:
        assert isinstance(state, AdamState)
        return adam.advance(state, steps, settings, BNS(), task.model.scheduler, 1.0, objective)

    def spent(state: DistillationState) -> tuple[int, int]:
        evaluations = state.iteration * min(settings.batch_size, settings.training_pairs) * nfe * task.forwards
        return evaluations, evaluations

    return Method(AdamState.begin, advance, spent, validate_every)


def start_of(name: str, task: Task, nfe: int) -> Tensor:
    """BNS parameters of a start; 'least_squares' is fitted to the trajectories of the training pairs."""
    scheduler = task.model.scheduler
    if name != "least_squares":
        return BNS().start(GridSolver(STARTS[name], nfe, Grid()), scheduler)
    pairs = task.train
    assert pairs.path is not None
    times = Grid().times(nfe, scheduler)
    solver = fit(
        lambda rows: task.model.field(pairs.condition[rows], task.guidance_scale),
        pairs.x0,
        pairs.path.state(times),
        times,
    )
    return BNS().start_from(solver, scheduler)


def run(task: Task, method: Method, parameters: Tensor) -> Iterator[Mark]:
    """The marks of one run, its start first."""
    state = method.begin(parameters)
    seconds = 0.0
    while True:
        theta = torch.tensor(state.parameters, dtype=torch.float64)
        psnr = task.psnr(BNS().to_ns(theta, task.model.scheduler, 1.0))
        state = state.with_validation(psnr)
        yield Mark(state.iteration, psnr, *method.spent(state), seconds)
        if state.status != "running":
            return
        begin = time.perf_counter()
        state = method.advance(state, method.validate_every)
        seconds += time.perf_counter() - begin


@dataclass(frozen=True)
class Options:
    """What the command line asks of every run."""

    start: str
    pairs: int
    validation_pairs: int
    tolerance: float
    storage: str
    jacobian: Jacobian
    lm_batch: int
    lm_iterations: int
    adam_batch: int
    adam_iterations: int
    validate_every: int
    memory_mb: int


def make_method(name: str, task: Task, nfe: int, seed: int, options: Options) -> Method:
    if name == "lm":
        lm_settings = LMSettings(
            iterations=options.lm_iterations,
            batch_size=options.lm_batch,
            seed=seed,
            training_pairs=options.pairs,
            jacobian=options.jacobian,
        )
        return levenberg_marquardt(task, lm_settings, options.memory_mb * 2**20)
    adam_settings = AdamSettings(
        learning_rate=LEARNING_RATES[name],
        iterations=options.adam_iterations,
        batch_size=options.adam_batch,
        decay="polynomial",
        seed=seed,
        training_pairs=options.pairs,
    )
    return adam_method(task, nfe, adam_settings, options.validate_every)


def make_task(name: str, guidance_scale: float, seed: int, options: Options, storage: Storage) -> Task:
    """The model and its pairs; training pairs are the seed's own, validation pairs are shared by all seeds."""
    pool = LocalPool(HostSettings(adapter="zoo", options={"weights": name}, storage=storage.root))
    facts = pool.call("facts")

    def spec(stream: int, count: int, trajectory: bool) -> PairSpec:
        return PairSpec(
            model_digest=facts.digest,
            conditioning={"name": "labels", "options": {"classes": 10}},
            guidance_scale=guidance_scale,
            shape=facts.shape,
            seed=stream,
            count=count,
            batch_size=64,
            shard_size=256,
            rtol=options.tolerance,
            atol=options.tolerance,
            device_class=facts.device_class,
            trajectory=trajectory,
        )

    specs = [
        spec(2 + seed, options.pairs, options.start == "least_squares"),
        spec(0, options.validation_pairs, False),
    ]
    ensure_pairs(storage, specs, pool, wait=True, note=click.echo)
    train, validation = (PairStore(storage, each).load() for each in specs)
    return Task(ZooModel(name), guidance_scale, train, validation)


def table(rows: Sequence[Sequence[str]], heading: Sequence[str]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])


def first_above(marks: list[Mark], target: float) -> Mark | None:
    return next((mark for mark in marks if mark.psnr >= target), None)


def summary(runs: dict[tuple[str, ...], list[Mark]], targets: Sequence[float]) -> str:
    """What each run had spent when it first reached each PSNR, and its best."""
    rows = []
    for key, marks in runs.items():
        best = max(marks, key=lambda mark: mark.psnr)
        for goal, mark in [*((f"{target:g}", first_above(marks, target)) for target in targets), ("best", best)]:
            if mark is None:
                rows.append([*key, goal, "not reached", "", "", "", ""])
            else:
                spent = (f"{mark.forwards:,}", f"{mark.backwards:,}", f"{mark.seconds:.1f}")
                rows.append([*key, goal, f"{mark.psnr:.2f}", str(mark.iteration), *spent])
    heading = ["model", "guidance", "NFE", "seed", "method", "goal (dB)", "PSNR (dB)", "iteration"]
    return table(rows, [*heading, "forwards", "backwards", "seconds"])


def curves(runs: dict[tuple[str, ...], list[Mark]]) -> str:
    """Every validation of every run."""
    parts = []
    for key, marks in runs.items():
        rows = [
            [str(m.iteration), f"{m.psnr:.2f}", f"{m.forwards:,}", f"{m.backwards:,}", f"{m.seconds:.1f}"]
            for m in marks
        ]
        heading = ["iteration", "PSNR (dB)", "forwards", "backwards", "seconds"]
        parts.append(f"### {', '.join(key)}\n\n{table(rows, heading)}")
    return "\n\n".join(parts)


def split(kind: Callable[[str], object]) -> Callable[..., list[object]]:
    """A click callback for comma-separated values."""

    def callback(context: click.Context, parameter: click.Parameter, value: str) -> list[object]:
        try:
            return [kind(part) for part in value.split(",")]
        except ValueError as error:
            raise click.BadParameter(f"{error}; give values separated by commas") from error

    return callback


def method_name(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}, choose from {', '.join(METHODS)}")
    return name


@click.command(help=(__doc__ or "").split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--models", default="digits_fm_ot", callback=split(str), help="Zoo models.")
@click.option("--guidance", default="1", callback=split(float), help="Guidance scales.")
@click.option("--nfe", default="8", callback=split(int), help="Evaluations per sample.")
@click.option("--seeds", default="0", callback=split(int), help="Each has training pairs and a batch order of its own.")
@click.option("--methods", default="lm", callback=split(method_name), help=f"Of {', '.join(METHODS)}.")
@click.option("--targets", default="45,50,51.4,53.5,55", callback=split(float), help="PSNRs to reach, dB.")
@click.option("--start", default="midpoint", type=click.Choice([*STARTS, "least_squares"]), help="On the uniform grid.")
@click.option("--pairs", default=520, help="Training pairs.")
@click.option("--validation-pairs", default=1024, help="Validation pairs.")
@click.option("--tolerance", default=1e-7, help="rtol and atol of the pairs.")
@click.option("--storage", default="", help="Folder to keep the pairs in; a temporary one by default.")
@click.option("--jacobian", default="forward", type=click.Choice(["forward", "central", "jvp"]), help="For lm.")
@click.option("--lm-batch", default=64, help="Pairs per iteration of lm.")
@click.option("--lm-iterations", default=25, help="Iterations of lm.")
@click.option("--adam-batch", default=40, help="Pairs per iteration of Adam.")
@click.option("--adam-iterations", default=15_000, help="Iterations of Adam, and length of its decay.")
@click.option("--validate-every", default=100, help="Iterations of Adam between validations; lm is validated at each.")
@click.option("--memory-mb", default=256, help="Budget of the normal equations.")
@click.option("--name", default="distillation", help="Name of the result file, after the date.")
def main(
    models: list[str],
    guidance: list[float],
    nfe: list[int],
    seeds: list[int],
    methods: list[str],
    targets: list[float],
    name: str,
    **rest: object,
) -> None:
    torch.set_num_threads(1)
    options = Options(**rest)  # type: ignore[arg-type]  # click has checked and converted them
    runs: dict[tuple[str, ...], list[Mark]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        storage = Storage.at(options.storage or temporary)
        for model, scale, seed in product(models, guidance, seeds):
            task = make_task(model, scale, seed, options, storage)
            for evaluations, method in product(nfe, methods):
                key = (model, f"{scale:g}", str(evaluations), str(seed), method)
                click.echo(", ".join(key))
                runs[key] = []
                prepared = make_method(method, task, evaluations, seed, options)
                for mark in run(task, prepared, start_of(options.start, task, evaluations)):
                    runs[key].append(mark)
                    click.echo(
                        f"  {mark.iteration:6d}  {mark.psnr:6.2f} dB  {mark.forwards:11,} forwards  "
                        f"{mark.backwards:11,} backwards  {mark.seconds:8.1f} s"
                    )
    click.echo(summary(runs, targets))
    write_report(runs, targets, options, name)


def write_report(runs: dict[tuple[str, ...], list[Mark]], targets: list[float], options: Options, name: str) -> None:
    today = datetime.date.today().isoformat()
    settings = ", ".join(f"{key} {value}" for key, value in vars(options).items() if key != "storage")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}-{name}.md"
    path.write_text(
        f"# Distillation without a backward pass, against Adam\n\n"
        f"{today} · {os.cpu_count()} CPU cores ({platform.machine()}), one thread · torch {torch.__version__} · made "
        f"by `python benchmarks/bench_distillation.py` with\n{settings}.\n\n"
        f"Forwards and backwards are passes of the network over one sample, spent on training pairs; making the pairs "
        f"and\nvalidating is not counted, nor is it in the seconds. Goals are PSNRs on the validation pairs.\n\n"
        f"{summary(runs, targets)}\n\n## Curves\n\n{curves(runs)}\n"
    )
    click.echo(f"wrote {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
