"""``bespoke distil-network``: compares distilling the solver with distilling the network (BNS Table 3), on one model.

Solvers are distilled as the points of a sweep, by a host in this process. Networks are distilled by training tasks, in
this process or under Ray. Complete pairs, points and students are reused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.cluster.answers import check_outside
from orchestrator.config.pair_plan import PairKey, pair_spec, pair_specs
from orchestrator.content import digest
from orchestrator.features.base import fid_metric
from orchestrator.features.moments import feature_moments, frechet_distance, reference_moments
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.lock import exclusive
from orchestrator.metrics.base import summarise
from orchestrator.models.facts import ModelFacts
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.comparison import ComparisonRow, draw, markdown_table
from orchestrator.network_distillation.config import NetworkDistillationConfig, ProgressiveConfig, WeightsConfig
from orchestrator.network_distillation.progressive import ProgressiveRecipe, stages
from orchestrator.network_distillation.students import StudentResult, StudentStore
from orchestrator.network_distillation.weights import WeightsRecipe
from orchestrator.pairs import PairSet, PairSpec, PairStore
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.progress import Note, bar, note
from orchestrator.results.inventory import note_older, record_needs
from orchestrator.results.store import Result, ResultStore, Row, rows
from orchestrator.storage import Storage, digest_of
from orchestrator.tracking.mlflow import DESCRIPTION, PARENT, ROLE, RunLog, open_experiment
from orchestrator.tracking.uri import resolve_tracking_uri
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.theta import ThetaArtifact
from sweeps.examination import check_teacher
from sweeps.point import RESULT_FORMAT, AnyPoint, LearnedPoint
from sweeps.points.execute import TrialContext, run_point
from sweeps.space import check_pairs, fixed_points, learned_points
from sweeps.student_jobs import Job, train
from sweeps.sweep import best_choices, by_key

SAMPLING_BATCH = 512
"""Samples per model call."""

SCORE_FORMAT = 1
"""Increment whenever the same samples would be scored differently."""


@dataclass(frozen=True)
class Comparison:
    """Result of ``bespoke distil-network``.

    Attributes:
        rows: Rows of the table: ground truth first, then by NFE.
        markdown: The table as Markdown.
        table, figure: Locations of the table and the figure.
    """

    rows: list[ComparisonRow]
    markdown: str
    table: str
    figure: str


def run_comparison(
    config: NetworkDistillationConfig, *, address: str | None, wait: bool, force: bool = False, announce: Note = note
) -> Comparison:
    """Run or resume a comparison.

    Args:
        config: A checked configuration.
        address: Ray cluster for the training tasks; None for this machine (with Ray only if ``workers`` is above 1).
        wait: Whether to wait for another process that uses the same comparison or pairs.
        force: Whether to go on with a teacher that its examination refuses.
        announce: Receives progress notes, in sentences.

    Raises:
        UserError: Something in the configuration or the environment cannot work.
    """
    storage = Storage.at(config.storage)
    check_outside(storage, resolve_tracking_uri(config.tracking_uri, config.storage), address)
    folder = f"network-distillation/{config.name}"
    with exclusive(storage, f"{folder}/.lock", wait=wait, announce=announce):
        work = _Work(config, storage)
        parent = work.open_tracking()
        note_older(storage, RESULT_FORMAT, announce)
        specs = [*work.specs.values(), *work.larger.values()]
        needs = {f"pairs/{spec.digest}" for spec in specs} | {f"students/{job.recipe.key}" for job in work.jobs()}
        needs |= {f"points/{point.key}" for point in fixed_points(work.experiment, work.specs)}
        record_needs(storage, config.name, "distil-network", needs, add=True, announce=announce)
        try:
            check_teacher(storage, work.pool, work.facts, specs, force=force, announce=announce)
            ensure_pairs(storage, specs, work.pool, wait=wait, announce=announce)
            results, points = work.distil_solvers()
            needs |= {f"points/{key}" for key in points}
            record_needs(storage, config.name, "distil-network", needs, add=False, announce=announce)
            students = train(work.jobs(), storage, config.workers, address)
            comparison_rows = work.rows(results, points, students)
            return work.publish(folder, parent, comparison_rows)
        except KeyboardInterrupt:
            parent.finish({}, status="KILLED")
            raise


class _Work:
    """One comparison: its model, host, pairs, and MLflow run."""

    def __init__(self, config: NetworkDistillationConfig, storage: Storage):
        self.config, self.storage = config, storage
        self.experiment = config.experiment()
        options = dict(config.model.options)
        self.pool = LocalPool(Host(HostSettings(adapter=config.model.name, options=options, storage=storage.root)))
        self.model = ZooModel(**options)
        self.facts: ModelFacts = self.pool.call(Request.of(HostProtocol.facts))
        check_pairs(self.experiment, self.facts.shape)
        self.specs = pair_specs(self.experiment, self.facts)
        train = PairKey("train", 1.0, config.seed)
        self.train = self.specs[train]
        self.validation = self.specs[PairKey("validation", 1.0, 0)]
        self.test = self.specs[PairKey("test", 1.0, 0)]
        #: Training sets of the students, by size. They extend the solver's training pairs.
        self.larger = {
            entry.trajectories: pair_spec(self.experiment, self.facts, train, count=entry.trajectories)
            for entry in config.weights
        }
        self.extractor = plugins.build("features", config.features)
        self.reference = reference_moments(config.features, config.dataset)

    # ---- MLflow -----------------------------------------------------------------------------------------------

    def open_tracking(self) -> RunLog:
        """Find or create the comparison's MLflow run, before any other work."""
        uri = resolve_tracking_uri(self.config.tracking_uri, self.config.storage)
        self.tracking_uri = uri
        self.tracker, self.mlflow_experiment = open_experiment(uri, self.config.name, self.storage)
        # The key names the test pairs and features: with others it is a different comparison.
        key = f"network-distillation/{self.test.name}/{self.config.features}"
        parent = self.tracker.run(
            self.mlflow_experiment, key, f"network distillation: {self.config.name}", {ROLE: "network distillation"}
        )
        parent.tags({"bespoke.model": self.facts.name, "bespoke.model_digest": self.facts.digest})
        self.parent_key = key
        return parent

    # ---- distillation of the solver ---------------------------------------------------------------------------

    def distil_solvers(self) -> tuple[dict[str, Result], dict[str, AnyPoint]]:
        """Run the fixed solvers, then the learned ones that start from them, each as a trial of a sweep would."""
        context = TrialContext(
            storage=self.storage.root,
            tracking_uri=self.tracking_uri,
            experiment_id=self.mlflow_experiment,
            parent_run_id="",
            pool="",
            hosts=1,
            facts=self.facts,
        )
        fixed = fixed_points(self.experiment, self.specs)
        results: dict[str, Result] = {}

        def run(points: Sequence[AnyPoint], description: str) -> None:
            with bar(sum(point.iterations for point in points), "iteration", description) as progress:
                for point in points:
                    before = progress.n

                    def report(values: dict[str, float], before: float = before) -> None:
                        progress.update(before + int(values["iteration"]) - progress.n)

                    results[point.key] = run_point(point, context, self.pool, self.storage, report)
                    progress.update(before + point.iterations - progress.n)

        run(fixed, "fixed solvers")
        best = best_choices(fixed, results)
        learned = learned_points(self.experiment, self.specs, best, self.facts.scheduler)
        run(learned, "solver distillation")
        return results, by_key(fixed, learned)

    # ---- distillation of the network --------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All training tasks of the comparison."""
        jobs = [self._weights_job(entry, nfe) for entry in self.config.weights for nfe in self.config.nfe]
        if self.config.progressive is not None:
            jobs.append(self._progressive_job(self.config.progressive))
        return jobs

    def _weights_job(self, entry: WeightsConfig, nfe: int) -> Job:
        recipe = WeightsRecipe(
            teacher=self.config.model.options["weights"],
            teacher_digest=self.model.digest,
            train=self.larger[entry.trajectories].name,
            validation=self.validation.name,
            nfe=nfe,
            loss=entry.loss,
            settings=self._settings(entry, entry.trajectories),
            validate_every=entry.validate_every,
        )
        return Job(_weights_name(entry, self.config.weights), recipe, (nfe,), entry.iterations)

    def _progressive_job(self, entry: ProgressiveConfig) -> Job:
        dataset = plugins.build("datasets", self.config.dataset)
        recipe = ProgressiveRecipe(
            teacher=self.config.model.options["weights"],
            teacher_digest=self.model.digest,
            dataset=self.config.dataset,
            real_content=dataset.real_content,
            start_steps=entry.start_steps,
            settings=self._settings(entry, dataset.real_count()),
        )
        halvings = len(stages(entry.start_steps, min(self.config.nfe)))
        return Job("Progressive Distillation", recipe, self.config.nfe, halvings * entry.iterations)

    def _settings(self, entry: WeightsConfig | ProgressiveConfig, training_set: int) -> Adam:
        return Adam(
            learning_rate=entry.learning_rate,
            iterations=entry.iterations,
            batch_size=min(entry.batch_size, training_set),
            decay=entry.decay,
            seed=self.config.seed,
            training_pairs=training_set,
        )

    # ---- evaluation -------------------------------------------------------------------------------------------

    def rows(
        self,
        results: dict[str, Result],
        points: dict[str, AnyPoint],
        students: Sequence[tuple[Job, list[StudentResult]]],
    ) -> list[ComparisonRow]:
        """Rows of all methods on the same fresh noise: PSNR to ground truth, Frechet distance to real data."""
        table = rows(results.values())
        trained = [(job, result) for job, results_of_job in students for result in results_of_job]
        with bar(1 + len(table) + len(trained), "method", "evaluation") as progress:
            nfe = round(_ground_truth_nfe(self.storage, self.test) / self.test.count)
            exact = self._score("ground truth", lambda: self.inputs.x1) | {"psnr_db": math.inf, "psnr_stderr": 0.0}
            first = ComparisonRow(method="Ground truth (dopri5)", nfe=nfe, **exact)
            progress.update()
            others = []
            for row in table:
                others.append(self._solver_row(row, results, points))
                progress.update()
            for job, result in trained:
                others.append(self._student_row(job, result))
                progress.update()
        return [first, *sorted(others, key=lambda row: (row.nfe, row.psnr_db))]

    @cached_property
    def inputs(self) -> PairSet:
        """The test pairs: fresh noise, labels, and ground truth."""
        return PairStore(self.storage, self.test).load()

    def _score(self, made_by: str, sample: Callable[[], Tensor]) -> dict[str, Any]:
        """PSNR and Frechet distance of samples from the test noise. Stored, because sampling is deterministic.

        Args:
            made_by: Identifies the sampler and its parameters.
            sample: Draws the samples, shape (N, ...).
        """
        compared = digest(self.extractor.content, self.reference.to_bytes())
        identity = digest_of([made_by, self.model.digest, self.test.name, compared, SCORE_FORMAT])
        key = f"network-distillation/scores/{identity}.json"
        if not self.storage.exists(key):
            samples = sample()
            psnr = plugins.build("metrics", "psnr").per_sample(samples, self.inputs.x1, self.facts.data_range)
            summary = summarise(psnr.tolist())
            fid = frechet_distance(feature_moments(self.extractor, samples), self.reference)
            # Ground truth has an infinite PSNR to itself, which JSON cannot represent.
            numbers = {"psnr_db": summary.mean, "psnr_stderr": summary.stderr} if summary.count else {}
            self.storage.write_json(key, numbers | {"fid": fid})
        scores: dict[str, Any] = self.storage.read_json(key)
        return scores

    def _solver_row(self, row: Row, results: dict[str, Result], points: dict[str, AnyPoint]) -> ComparisonRow:
        """Row of a solver, sampled by the host."""
        point = points[row.keys[0]]
        theta = ResultStore(self.storage, point.key).read_theta()
        solver = ThetaArtifact.from_json(theta, origin=point.name).solver
        if row.kind == "start":
            solver = self._start(point).to_ns(self.facts.scheduler)
            theta = ThetaArtifact(solver).to_json()
        flat = to_numpy(solver.flat())
        samples = Request.of(HostProtocol.sample, theta=flat, pairs=self.test.name, indices=range(self.test.count))
        scores = self._score(
            f"theta {hashlib.sha256(flat.tobytes()).hexdigest()}",
            lambda: torch.from_numpy(self.pool.call(samples)),
        )
        forwards = int(row.forwards)
        if row.kind in ("learned", "start") and any("best" in learned.start for learned in self.config.learned):
            # Finding the best start took the grid searches of all fixed solvers, which count as well.
            forwards += sum(r.forwards for r in results.values() if r.kind != "learned" and r.point["nfe"] == row.nfe)
        fixed = ComparisonRow(method=row.name, nfe=row.nfe, forwards=forwards, bytes=len(theta.encode()), **scores)
        if row.kind != "learned":
            return fixed
        return dataclasses.replace(
            fixed,
            forwards=forwards + _ground_truth_nfe(self.storage, self.train),
            backwards=int(row.backwards),
            training_set=self.train.count,
            parameters=self._parameters(point),
        )

    @staticmethod
    def _start(point: AnyPoint) -> GridSolver:
        """The solver from which a distillation started."""
        assert isinstance(point, LearnedPoint)
        return point.start.solver(point.nfe, point.sigma0)

    def _parameters(self, point: AnyPoint) -> int:
        """Number of parameters of a learned solver."""
        family = plugins.build("families", point.family, point.options)
        return int(family.start(self._start(point), self.facts.scheduler).numel())

    def _sample_student(self, result: StudentResult) -> Tensor:
        """Sample a student in this process, because its network is not the host's."""
        student = StudentStore(self.storage, result.key).load_student(self.model, result.nfe)
        solver = result.build_solver()
        parts = []
        with torch.no_grad():
            for first in range(0, len(self.inputs), SAMPLING_BATCH):
                batch = self.inputs.select(slice(first, first + SAMPLING_BATCH))
                parts.append(solver.sample(student.field(batch.condition, 1.0), batch.x0))
        return torch.cat(parts)

    def _student_row(self, job: Job, result: StudentResult) -> ComparisonRow:
        return ComparisonRow(
            method=job.method + ("" if result.status == "finished" else f" ({result.status})"),
            nfe=result.nfe,
            forwards=result.forwards + result.data_forwards,
            backwards=result.backwards,
            training_set=result.training_set,
            parameters=result.parameters,
            bytes=result.bytes,
            **self._score(f"student {result.key} nfe{result.nfe}", lambda: self._sample_student(result)),
        )

    # ---- output -----------------------------------------------------------------------------------------------

    def publish(self, folder: str, parent: RunLog, rows: list[ComparisonRow]) -> Comparison:
        """Write table and figure to the storage and MLflow, and log an MLflow run per row."""
        markdown = markdown_table(rows, self.config.features, f"real {self.config.dataset}")
        with tempfile.TemporaryDirectory() as temporary:
            figure = Path(temporary) / "comparison.png"
            draw(rows, self.config.features, figure)
            self.storage.write(f"{folder}/comparison.png", figure.read_bytes())
            parent.file(figure)
        self.storage.write(f"{folder}/comparison.md", markdown.encode())
        self.storage.write_json(f"{folder}/comparison.json", [_json_row(row) for row in rows])
        for row in rows:
            self._log(row, parent)
        parent.tags({DESCRIPTION: f"# {self.config.name}\n\n{markdown}"})
        parent.finish({"methods": len(rows)}, texts={"comparison.md": markdown})
        locations = (self.storage.location(f"{folder}/{name}") for name in ("comparison.md", "comparison.png"))
        return Comparison(rows, markdown, *locations)

    def _log(self, row: ComparisonRow, parent: RunLog) -> None:
        name = f"{row.method} nfe{row.nfe:g}"
        tags = {PARENT: parent.run_id, ROLE: "network distillation row"}
        log = self.tracker.run(self.mlflow_experiment, f"{self.parent_key}/{name}", name, tags)
        log.parameters({"method": row.method, "nfe": f"{row.nfe:g}", "features": self.config.features})
        numbers = {
            key: float(value)
            for key, value in _json_row(row).items()
            if isinstance(value, int | float) and key not in ("fid", "nfe")
        }
        log.finish({**numbers, fid_metric(self.config.features): row.fid})


def _weights_name(entry: WeightsConfig, entries: Sequence[WeightsConfig]) -> str:
    """``Weights (LTE)``, with the settings that distinguish it from the others of the comparison."""
    texts = {"trajectories": f"{entry.trajectories}", "iterations": f"{entry.iterations} iterations"}
    texts |= {"batch_size": f"batch {entry.batch_size}", "learning_rate": f"lr {entry.learning_rate:g}"}
    texts |= {"decay": entry.decay, "validate_every": f"validated every {entry.validate_every}"}
    alike = [other for other in entries if other.loss == entry.loss]
    differing = [text for key, text in texts.items() if len({getattr(other, key) for other in alike}) > 1]
    return ", ".join([f"Weights ({entry.loss.upper()})", *differing])


def _ground_truth_nfe(storage: Storage, spec: PairSpec) -> int:
    """Evaluations spent on a pair set; without guidance, each is one forward."""
    return PairStore(storage, spec).evaluations()


def _json_row(row: ComparisonRow) -> dict[str, Any]:
    """A row without the infinite PSNR of ground truth, which JSON and MLflow cannot store."""
    return {key: value for key, value in dataclasses.asdict(row).items() if value != math.inf}
