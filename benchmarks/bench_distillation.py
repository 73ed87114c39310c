"""Distillation without a backward pass against Adam: model evaluations and time to reach a validation PSNR.

python benchmarks/bench_distillation.py --nfe 8 --methods lm                           # half a minute
python benchmarks/bench_distillation.py --nfe 4,8,12,16 --seeds 0,1,2 --storage DIR    # hours; resumes

Adam runs once for each learning rate; 5e-4 is Algorithm 2 as published. All Adam runs of one NFE are batched, which is
faster and changes their results by rounding alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import click
import torch
from distillation_report import RESULTS, Mark, Run, ratios, write_report
from torch import Tensor

from orchestrator import plugins
from orchestrator.hosts.host import Host
from orchestrator.hosts.lockstep import Requests, run_in_lockstep
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.base import AUTOCAST, AutocastField, ModelAdapter, Precision
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers import NSSolver
from solvers.batched import sample_batched
from solvers.distil.drive import drive, map_queries
from solvers.distil.least_squares import fit
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import (
    GradientQuery,
    LossAndGradient,
    LossQuery,
    Method,
    NormalQuery,
    Problem,
    Query,
)
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.normal_equations import Jacobian, NormalEquations, normal_equations
from solvers.distil.state import DistillationState
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.bns import BNS, LEFT_OUT, Beginning
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.field import VelocityField
from solvers.grids import Grid
from solvers.losses import per_sample_mse, psnr_db, psnr_loss

STARTS = {"euler": Euler(), "midpoint": Midpoint(), "heun": Heun(), "ab2": AdamsBashforth(2), "ab3": AdamsBashforth(3)}
METHODS = ("lm", "adam")
SCORING_BATCH = 512


@dataclass(frozen=True)
class Task:
    """One model at one guidance scale, with its pairs."""

    model: ModelAdapter
    guidance_scale: float
    train: PairSet
    validation: PairSet
    precision: Precision = "float32"

    def field(self, condition: Tensor) -> VelocityField:
        """The velocity field that distillation uses."""
        field: VelocityField = self.model.field(condition, self.guidance_scale)
        dtype = AUTOCAST[self.precision]
        return field if dtype is None else AutocastField(field, dtype)

    @property
    def forwards(self) -> int:
        """Network forwards per velocity evaluation."""
        return self.model.forwards_per_evaluation(self.guidance_scale)

    def sample(self, solver: NSSolver, pairs: PairSet) -> Tensor:
        return solver.sample(self.field(pairs.condition), pairs.x0)

    @torch.no_grad()
    def psnr(self, solver: NSSolver) -> float:
        """Mean PSNR on the validation pairs, dB."""
        parts = [
            self.validation.select(slice(first, first + SCORING_BATCH))
            for first in range(0, len(self.validation), SCORING_BATCH)
        ]
        # Scores use the network as loaded, whatever the precision of the distillation.
        samples = [solver.sample(self.model.field(part.condition, self.guidance_scale), part.x0) for part in parts]
        mse = torch.cat([per_sample_mse(sample, part.x1) for sample, part in zip(samples, parts, strict=True)])
        return float(psnr_db(mse, self.model.data_range).mean())


LABELS: dict[str, Any] = {"name": "labels", "options": {"classes": 10}}
CONDITIONING: dict[str, dict[str, Any]] = {"spoken_digits_fm_ot": {"name": "spoken_digits", "options": {}}}
"""Conditioning of the models that are not conditioned on one of ten labels."""


Steps = Generator[Requests, list[Any], DistillationState]
"""Iterations of a run as a generator of requests."""


@dataclass(frozen=True)
class Distillation:
    """A method, a function that takes its next iterations up to a validation, and a clock."""

    method: Method
    advance: Callable[[DistillationState], Steps]
    clock: Callable[[], float] = time.perf_counter


def levenberg_marquardt(task: Task, method: LevenbergMarquardt, memory_bytes: int) -> Distillation:
    @torch.no_grad()
    def answer(query: Query) -> NormalEquations | float:
        assert isinstance(query, NormalQuery | LossQuery)
        pairs = task.train.select(query.indices)
        if isinstance(query, LossQuery):
            return float(psnr_loss(task.sample(query.solver, pairs), pairs.x1).double().mean())
        return normal_equations(
            query.solver,
            lambda rows: task.field(pairs.condition[rows]),
            pairs.x0,
            pairs.x1,
            memory_bytes=memory_bytes,
            jacobian=query.jacobian,
            free=query.free,
        )

    def advance(state: DistillationState) -> Steps:
        return drive(method.iterate(state, 1, Problem(BNS(), task.model.scheduler)), answer)
        yield []  # a generator without requests: it evaluates the model itself

    return Distillation(method, advance)


class BatchedLosses:
    """Losses and gradients of many theta of one NFE in one model batch.

    Attributes:
        tasks: The task of each seed; they differ only in their training pairs.
        seconds: Time so far per run.
    """

    def __init__(self, tasks: dict[int, Task]):
        self.tasks = tasks
        self.seconds = 0.0

    def answer(self, groups: list[Requests]) -> list[list[LossAndGradient]]:
        begin = time.perf_counter()
        calls = [request.arguments for group in groups for request in group]
        pairs = [self.tasks[call["seed"]].train.select(call["indices"]) for call in calls]
        task = next(iter(self.tasks.values()))
        field = task.field(torch.cat([batch.condition for batch in pairs]))
        thetas = torch.stack([call["theta"] for call in calls]).requires_grad_()
        samples = sample_batched(thetas, field, torch.stack([batch.x0 for batch in pairs]))
        x1 = torch.stack([batch.x1 for batch in pairs])
        losses = psnr_loss(samples.flatten(0, 1), x1.flatten(0, 1)).double().view(len(calls), -1).mean(dim=1)
        (gradients,) = torch.autograd.grad(losses.sum(), thetas)
        self.seconds += (time.perf_counter() - begin) / len(calls)
        return [
            [LossAndGradient(float(loss), gradient)] for loss, gradient in zip(losses.detach(), gradients, strict=True)
        ]


def adam_distillation(task: Task, seed: int, method: Adam, validate_every: int, batched: BatchedLosses) -> Distillation:
    def requests(query: Query) -> Requests:
        assert isinstance(query, GradientQuery)
        assert isinstance(query.at, NSSolver)
        return [Request("loss", {"theta": query.at.flat(), "indices": query.indices, "seed": seed})]

    def advance(state: DistillationState) -> Steps:
        iterations = method.iterate(state, validate_every, Problem(BNS(), task.model.scheduler))
        return map_queries(iterations, requests, lambda query, losses: losses[0])

    return Distillation(method, advance, clock=lambda: batched.seconds)


def backward_cost(task: Task, batch: int, repeats: int = 51) -> float:
    """Cost of a backward pass through the network, in forwards: median over calls with Adam's batch."""
    pairs = task.train.select(list(range(min(batch, len(task.train)))))
    field, t = task.model.field(pairs.condition, task.guidance_scale), torch.tensor(0.5, dtype=torch.float64)
    x = pairs.x0.clone().requires_grad_()
    ratios = []
    for _ in range(repeats):
        begin = time.perf_counter()
        with torch.no_grad():
            field(x, t)
        forward = time.perf_counter() - begin
        # Adam's forward also keeps what its backward needs; that cost is charged to the backward.
        begin = time.perf_counter()
        torch.autograd.grad(field(x, t).sum(), x)
        ratios.append((time.perf_counter() - begin - forward) / forward)
    return statistics.median(ratios)


def start_of(name: str, family: BNS, task: Task, nfe: int) -> Tensor:
    """Parameters of a start; 'least_squares' is fitted to the trajectories of the training pairs."""
    scheduler = task.model.scheduler
    if name != "least_squares":
        return family.start(GridSolver(STARTS[name], nfe, Grid()), scheduler)
    pairs = task.train
    assert pairs.path is not None
    times = Grid().times(nfe, scheduler)
    solver = fit(
        lambda rows: task.model.field(pairs.condition[rows], task.guidance_scale),
        pairs.x0,
        pairs.path.state(times),
        times,
    )
    return family.start_from(solver, scheduler)


def marks_of(
    run: Run, task: Task, distillation: Distillation, start: str, family: BNS
) -> Generator[Requests, list[Any], list[Mark]]:
    """The marks of one run, its start first; prints each as it is made."""
    state = distillation.method.begin(start_of(start, family, task, run.nfe))
    marks: list[Mark] = []
    seconds = 0.0
    while True:
        theta = torch.tensor(state.parameters, dtype=torch.float64)
        psnr = task.psnr(BNS().to_ns(theta, task.model.scheduler, 1.0))
        state = state.with_validation(psnr)
        forwards, backwards = (task.forwards * count for count in distillation.method.evaluations(state, run.nfe))
        marks.append(Mark(state.iteration, psnr, forwards, backwards, seconds))
        print_mark(run, marks[-1])
        if state.status != "running":
            return marks
        begin = distillation.clock()
        state = yield from distillation.advance(state)
        seconds += distillation.clock() - begin


def print_mark(run: Run, mark: Mark) -> None:
    click.echo(
        f"{run.model} w={run.guidance:g} NFE {run.nfe:2d} seed {run.seed} {run.label:11s} {mark.iteration:6d}  "
        f"{mark.psnr:6.2f} dB  {mark.forwards:11,} forwards  {mark.backwards:11,} backwards  {mark.seconds:8.1f} s"
    )


@dataclass(frozen=True)
class Options:
    """Options of the command line that apply to every run."""

    start: str
    pairs: int
    validation_pairs: int
    tolerance: float
    jacobian: Jacobian
    lm_batch: int
    lm_first_batch: int | None
    lm_growth: float
    beginning: Beginning
    lm_iterations: int
    adam_batch: int
    adam_iterations: int
    validate_every: int
    memory_mb: int
    precision: Precision


def run_lm(run: Run, task: Task, options: Options) -> list[Mark]:
    settings = LevenbergMarquardt(
        iterations=options.lm_iterations,
        batch_size=options.lm_batch,
        first_batch_size=options.lm_first_batch,
        batch_growth=options.lm_growth,
        seed=run.seed,
        training_pairs=options.pairs,
        jacobian=options.jacobian,
    )
    distillation = levenberg_marquardt(task, settings, options.memory_mb * 2**20)
    (marks,) = run_in_lockstep(
        [marks_of(run, task, distillation, options.start, BNS(beginning=options.beginning))], lambda groups: []
    )
    return marks


def run_adam(runs: Sequence[Run], tasks: dict[int, Task], options: Options) -> list[list[Mark]]:
    """The marks of several runs of one model, guidance scale and NFE, run in lockstep."""
    batched = BatchedLosses(tasks)

    def one(run: Run) -> Generator[Requests, list[Any], list[Mark]]:
        settings = Adam(
            learning_rate=run.rate,
            iterations=options.adam_iterations,
            batch_size=options.adam_batch,
            decay="polynomial",
            seed=run.seed,
            training_pairs=options.pairs,
        )
        task = tasks[run.seed]
        distillation = adam_distillation(task, run.seed, settings, options.validate_every, batched)
        return marks_of(run, task, distillation, options.start, BNS(beginning=options.beginning))

    return run_in_lockstep([one(run) for run in runs], batched.answer)


def make_task(name: str, guidance_scale: float, seed: int, options: Options, storage: Storage) -> Task:
    """The model and its pairs: each seed has its own training pairs; all seeds use the same validation pairs."""
    pool = LocalPool(Host(HostSettings(adapter="zoo", options={"weights": name}, storage=storage.root)))
    facts = pool.call(Request.of(HostProtocol.facts))

    conditioning = CONDITIONING.get(name, LABELS)

    def spec(stream: int, count: int, trajectory: bool) -> PairSpec:
        return PairSpec(
            model_digest=facts.digest,
            conditioning=conditioning,
            content=plugins.build("datasets", conditioning["name"], conditioning["options"]).content,
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
    ensure_pairs(storage, specs, pool, wait=True, announce=click.echo)
    train, validation = (PairStore(storage, each).load() for each in specs)
    return Task(ZooModel(name), guidance_scale, train, validation, options.precision)


class Done:
    """Marks of finished runs, kept in a storage so that the same command resumes where it stopped."""

    def __init__(self, storage: Storage, options: Options):
        self.storage, self.options = storage, options

    def _key(self, run: Run) -> str:
        options = {key: value for key, value in vars(self.options).items() if (key, value) != ("precision", "float32")}
        content = json.dumps([run._asdict(), options], sort_keys=True)
        return f"benchmarks/distillation/{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"

    def load(self, run: Run) -> list[Mark] | None:
        if not self.storage.exists(self._key(run)):
            return None
        return [Mark(**mark) for mark in json.loads(self.storage.read(self._key(run)))]

    def save(self, run: Run, marks: Sequence[Mark]) -> None:
        self.storage.write(self._key(run), json.dumps([dataclasses.asdict(mark) for mark in marks]).encode())


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
@click.option("--seeds", default="0", callback=split(int), help="Each has its own training pairs and batch order.")
@click.option("--methods", default=",".join(METHODS), callback=split(method_name), help="Methods to run.")
@click.option("--learning-rates", default="5e-4,2e-3,5e-3,1e-2", callback=split(float), help="Adam runs once for each.")
@click.option("--start", default="midpoint", type=click.Choice([*STARTS, "least_squares"]), help="On the uniform grid.")
@click.option("--pairs", default=520, help="Training pairs.")
@click.option("--validation-pairs", default=1024, help="Validation pairs.")
@click.option("--tolerance", default=1e-7, help="rtol and atol of the pairs.")
@click.option("--storage", default="", help="Folder for pairs and finished runs; a temporary one by default.")
@click.option("--jacobian", default="forward", type=click.Choice(["forward", "central", "jvp"]), help="Of lm.")
@click.option("--lm-batch", default=64, help="Pairs per iteration of lm, the largest if they grow.")
@click.option("--lm-first-batch", type=int, help="Pairs of lm's first iteration, if they grow.")
@click.option("--lm-growth", default=1.0, help="Growth of lm's pairs from one iteration to the next.")
@click.option("--lm-iterations", default=25, help="Iterations of lm.")
@click.option("--adam-batch", default=40, help="Pairs per iteration of Adam.")
@click.option("--adam-iterations", default=15_000, help="Iterations of Adam, and length of its decay.")
@click.option(
    "--beginning", default="held", type=click.Choice(list(LEFT_OUT)), help="Of BNS: what lm and Adam learn of it."
)
@click.option("--validate-every", default=250, help="Iterations of Adam between validations; lm: after each.")
@click.option("--memory-mb", default=256, help="Memory budget of the normal equations.")
@click.option("--precision", default="float32", type=click.Choice(list(AUTOCAST)), help="Of the network, by autocast.")
@click.option("--name", default="distillation", help="Name of the result file, after the date.")
def main(
    models: list[str],
    guidance: list[float],
    nfe: list[int],
    seeds: list[int],
    methods: list[str],
    learning_rates: list[float],
    storage: str,
    name: str,
    **rest: object,
) -> None:
    torch.set_num_threads(1)
    options = Options(**rest)  # type: ignore[arg-type]  # click has checked and converted them
    runs: dict[Run, list[Mark]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        store = Storage.at(storage or temporary)
        done = Done(store, options)
        backward = 0.0
        for model, scale in product(models, guidance):
            tasks = {seed: make_task(model, scale, seed, options, store) for seed in seeds}
            backward = backward or backward_cost(tasks[seeds[0]], options.adam_batch)
            for evaluations in nfe:
                planned = [Run(model, scale, evaluations, seed, "lm") for seed in seeds if "lm" in methods]
                for seed, rate in product(seeds, learning_rates):
                    planned += [Run(model, scale, evaluations, seed, "adam", rate)] if "adam" in methods else []
                marks_by_run = {run: done.load(run) for run in planned}
                for run in planned:
                    if run.method == "lm" and marks_by_run[run] is None:
                        marks_by_run[run] = run_lm(run, tasks[run.seed], options)
                        done.save(run, marks_by_run[run] or [])
                missing = [run for run in planned if marks_by_run[run] is None]
                for run, marks in zip(missing, run_adam(missing, tasks, options), strict=True):
                    marks_by_run[run] = marks
                    done.save(run, marks)
                runs |= {run: marks for run, marks in marks_by_run.items() if marks}
    click.echo(ratios(runs, backward))
    path = write_report(runs, backward, vars(options), name)
    click.echo(f"wrote {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
