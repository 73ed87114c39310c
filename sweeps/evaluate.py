"""``bespoke evaluate``: scores solvers x datasets x metrics on the cluster, then writes MLflow, tables and a report."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator import plugins
from orchestrator.cluster.connect import check_fits
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_spec
from orchestrator.evaluation.bootstrap import compare
from orchestrator.evaluation.cases import Case, Score
from orchestrator.evaluation.check import datasets, metric_specs
from orchestrator.evaluation.run import Evaluation
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.hosts.scorer import Scorer
from orchestrator.hosts.settings import ScorerSettings
from orchestrator.lock import exclusive
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import PoolSettings
from orchestrator.progress import Note, note, stage
from orchestrator.reports.evaluation import write_evaluation, write_tables
from orchestrator.reports.gallery import GROUND_TRUTH, Panel
from orchestrator.reports.tables import Table, across_datasets, by_dataset, comparisons
from orchestrator.results.truth import find_truths
from orchestrator.tracking.mlflow import ROLE, SWEEP, THETA, THETA_FILE, RunLog, entity_name
from solvers.families import GridSolver
from solvers.ns import InvalidThetaError
from solvers.theta import ThetaArtifact
from sweeps.ray_session import RaySession
from sweeps.session import keep_only, upload

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class FoundTheta:
    """A theta and its origin.

    Attributes:
        origin: A path, ``runs:/…`` or ``models:/…``.
        artifact: The theta artifact.
        run_id: MLflow run that it came from; None for a file.
    """

    origin: str
    artifact: ThetaArtifact
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOutcome:
    """Result of an evaluation.

    Attributes:
        scores: Every metric of every solver on every dataset.
        tables: Tables of these scores.
        report: Location of ``report.html``; the tables are beside it.
        failed: Metrics without a value, with the reason.
        log: Location of the log with the details of failures; None if nothing was logged.
    """

    scores: list[Score]
    tables: list[Table]
    report: str
    failed: dict[str, str]
    log: str | None


def evaluate_thetas(
    config: ExperimentConfig,
    thetas: Sequence[FoundTheta],
    *,
    address: str | None,
    wait: bool,
    allow_transfer: bool,
    force: bool = False,
    announce: Note = note,
) -> EvaluationOutcome:
    """Score every theta on every dataset with every metric, at theta's own guidance scale.

    A theta for a range of guidance scales is scored at those of the configuration.

    Args:
        config: Experiment that names the model; its section ``evaluation`` names datasets, metrics and baselines, and
            has passed :func:`~orchestrator.evaluation.check.check_evaluation`.
        thetas: The theta to score.
        address, wait, force, announce: As for :class:`~sweeps.ray_session.RaySession`.
        allow_transfer: Allow theta made for another model.

    Raises:
        InvalidThetaError: theta belongs to another model and ``allow_transfer`` is false, or its range does not hold a
            guidance scale of the configuration.
        UserError: Something in the configuration or the environment cannot work.
    """
    thetas = at_scales(thetas, config.guidance_scale)
    with RaySession(config, address=address, wait=wait, force=force, announce=announce, command="evaluate") as session:
        for theta in thetas:
            theta.artifact.check_model(session.facts.digest, allow_transfer=allow_transfer)
        return _Run(session, thetas, announce).run()


def at_scales(thetas: Sequence[FoundTheta], scales: Sequence[float]) -> list[FoundTheta]:
    """The thetas, with one for each of these guidance scales in place of each that was made for a range.

    Raises:
        InvalidThetaError: A range does not hold one of the scales.
    """
    chosen = []
    for theta in thetas:
        if theta.artifact.guidance_range is None:
            chosen.append(theta)
            continue
        try:
            chosen += [replace(theta, artifact=theta.artifact.at(guidance_scale=scale)) for scale in scales]
        except InvalidThetaError as error:
            raise InvalidThetaError(
                f"{theta.origin} is evaluated at the guidance scales of the configuration, but {error}; set "
                f"guidance_scale"
            ) from error
    return chosen


class _Run:
    """One run of an evaluation."""

    def __init__(self, session: RaySession, thetas: Sequence[FoundTheta], announce: Note):
        self.session, self.announce = session, announce
        self.config, self.storage, self.facts = session.config, session.storage, session.facts
        self.settings = self.config.evaluation
        self.metrics = metric_specs(self.config)
        for spec in self.metrics:
            spec.check_samples(self.facts.kind, self.facts.shape, None, self.settings.samples or self.config.pairs.test)
        self.tracker, self.experiment = session.open_tracking()
        self.runs: dict[str, Run] = self.tracker.thetas(self.experiment)
        self.solvers = self._solvers(thetas)
        self.specs = self._specs()
        self.folder = f"{session.folder}/evaluation"

    # ---- solvers and pairs ------------------------------------------------------------------------------------

    def _solvers(self, thetas: Sequence[FoundTheta]) -> list[EvaluatedSolver]:
        solvers = {s.identity: s for s in map(self._of_theta, thetas)}
        scales = sorted({s.guidance_scale for s in solvers.values()})
        for scale in scales:
            for solver in self._baselines(scale, sorted({s.nfe or 0 for s in solvers.values()})):
                solvers.setdefault(solver.identity, solver)
            if self.settings.ground_truth:
                truth = EvaluatedSolver(kind="ground truth", name=GROUND_TRUTH, guidance_scale=scale)
                solvers[truth.identity] = truth
        return sorted(_distinctly_named(list(solvers.values())), key=lambda solver: solver.order)

    def _of_theta(self, theta: FoundTheta) -> EvaluatedSolver:
        artifact = theta.artifact
        run = self.runs.get(artifact.digest)
        if theta.run_id is not None:
            named = self.tracker.client.get_run(theta.run_id)
            run = named if "label" in named.data.params and "forwards" in named.data.metrics else None
        if run is not None and run.data.params.get("family") != artifact.family:
            run = None  # a different family with the same theta, e.g. Euler and DDIM on CondOT
        label = artifact.family
        if artifact.family in plugins.names("families"):
            label = plugins.load("families", artifact.family)().label
        passes = None
        if run is not None:
            label = run.data.params["label"]
            passes = run.data.metrics["forwards"] + run.data.metrics["backwards"]
        return EvaluatedSolver(
            kind="theta",
            name=label,
            guidance_scale=artifact.guidance_scale,
            ns=artifact.solver,
            artifact=artifact,
            origin=theta.origin,
            run_id=theta.run_id or (run.info.run_id if run is not None else None),
            passes=passes,
        )

    def _baselines(self, scale: float, nfes: Sequence[int]) -> list[EvaluatedSolver]:
        solvers = []
        for baseline in self.settings.baselines:
            family = baseline.build()
            for nfe in nfes:
                try:
                    family.steps(nfe)
                except ValueError:
                    self.announce(f"baseline {baseline.label} cannot run at NFE {nfe} and is skipped there")
                    continue
                solver = GridSolver(family, nfe, baseline.fixed_grid, baseline.sigma0).to_ns(self.facts.scheduler)
                solvers.append(EvaluatedSolver(kind="baseline", name=baseline.label, guidance_scale=scale, ns=solver))
        return solvers

    def _specs(self) -> dict[tuple[str, float], PairSpec]:
        """Pair specs by dataset and guidance scale. With the sweep's settings they equal its test pairs."""
        return {
            (name, scale): pair_spec(
                self.config,
                self.facts,
                PairKey("test", scale, 0),
                count=self.settings.samples,
                conditioning=dataset,
            )
            for name, dataset in datasets(self.config).items()
            for scale in sorted({solver.guidance_scale for solver in self.solvers})
        }

    # ---- the work ---------------------------------------------------------------------------------------------

    def run(self) -> EvaluationOutcome:
        cases = [
            Case(solver=solver, dataset=name, pairs=spec)
            for (name, scale), spec in self.specs.items()
            for solver in self.solvers
            if solver.guidance_scale == scale
        ]
        self.session.make_pairs(self.specs.values())
        with ExitStack() as stack:
            for digest in sorted({spec.digest for spec in self.specs.values()}):
                # One evaluation at a time per pair set: another would delete the samples that our scorers read.
                key = f"measurements/{digest}/.lock"
                stack.enter_context(exclusive(self.storage, key, wait=self.session.wait, announce=self.announce))
            scorers = self._scorers()
            if scorers is not None:
                stack.callback(scorers.close)
            shown = (self.facts.data_min, self.facts.data_max)
            evaluation = Evaluation(self.storage, self.session.pool, scorers, cases, self.metrics, shown)
            needed = [f"pairs/{spec.digest}" for spec in self.specs.values()]
            self.session.record_needs([*needed, *evaluation.references()], add=False)
            evaluation.check_forms()
            evaluation.measure()
        scores = self._marked(evaluation.scores(self._ground_truth_nfe()))
        tables = self._tables(evaluation, scores)
        self._log(scores)
        with stage("writing the report"):
            report = self._write(scores, tables)
        failed = {f"{s.metric.metric.column} of {_name(s)} on {s.case.dataset}": s.failure for s in scores if s.failure}
        return EvaluationOutcome(
            scores=scores, tables=tables, report=report, failed=failed, log=self.session.log.location
        )

    def _marked(self, scores: Sequence[Score]) -> list[Score]:
        """The scores; a PSNR near the accuracy of its ground truth has a footnote."""
        with stage("measuring the accuracy of ground truth"):
            specs = {spec.name: spec for spec in self.specs.values()}
            truths = find_truths(self.storage, self.session.pool, specs, self.announce)
        marked = []
        for score in scores:
            truth = truths.get(score.case.pairs.name)
            near = score.metric.metric.column == "psnr_db" and score.case.solver.kind != "ground truth"
            noted = truth is not None and near and truth.mark(score.summary.mean)
            marked.append(replace(score, footnote=truth.footnote()) if truth is not None and noted else score)
        return marked

    def _scorers(self) -> RayPool | None:
        """Start actors that hold the networks of metrics; None if no metric needs one."""
        if all(spec.metric.compares for spec in self.metrics):
            return None
        settings, resources = self.settings, self.config.resources
        check_fits(
            resources.hosts,
            resources.host_cpus,
            resources.host_gpus,
            settings.scorers * settings.scorer_cpus,
            settings.scorers * settings.scorer_gpus,
            others="the scorers",
            keys="evaluation.scorers or evaluation.scorer_cpus",
        )
        scorer = ScorerSettings(
            storage=self.storage.root,
            device=settings.scorer_device,
            threads=resources.host_threads,
            batch_size=settings.batch_size,
        )
        pool = PoolSettings(
            hosts=settings.scorers,
            cpus=settings.scorer_cpus,
            gpus=settings.scorer_gpus,
            request_timeout=resources.request_timeout,
        )
        return RayPool.start(f"{self.session.pool_name}-scorers", Scorer, scorer, pool)

    def _ground_truth_nfe(self) -> dict[str, float]:
        return {spec.name: PairStore(self.storage, spec).evaluations() / spec.count for spec in self.specs.values()}

    # ---- tables and report ------------------------------------------------------------------------------------

    def _tables(self, evaluation: Evaluation, scores: Sequence[Score]) -> list[Table]:
        results = []
        for spec in self.metrics:
            if not spec.metric.paired:
                continue
            cells: dict[tuple[str, float, float], list[Case]] = {}
            for score in scores:
                if score.metric is spec and score.failure is None and score.case.solver.kind != "ground truth":
                    cell = (score.case.dataset, score.case.solver.guidance_scale, score.nfe)
                    cells.setdefault(cell, []).append(score.case)
            for (dataset, scale, nfe), cases in sorted(cells.items()):
                where = f"{dataset}, NFE {nfe:.0f}" + ("" if scale == 1 else f", guidance {scale:g}")
                values = {case.solver.name: evaluation.per_sample(case, spec) for case in cases}
                results += [(where, spec.metric.column, c) for c in compare(spec.metric, values)]
        tested = comparisons(results)
        return [
            *by_dataset(scores, self.settings.training_passes),
            *across_datasets(scores),
            *([] if tested is None else [tested]),
        ]

    def _panels(self, scores: Sequence[Score]) -> list[tuple[str, Panel]]:
        """Samples of all solvers from the same noise, per dataset, guidance scale and NFE."""
        psnr = {
            (s.case.dataset, s.case.solver.digest, s.case.solver.guidance_scale): s.summary.mean
            for s in scores
            if s.metric.metric.column == "psnr_db"
        }
        panels = []
        for (dataset, scale), spec in self.specs.items():
            here = [s for s in self.solvers if s.guidance_scale == scale and s.ns is not None]
            for nfe in sorted({s.nfe for s in here if s.nfe}):
                entries = [(GROUND_TRUTH, None, None)] + [
                    (s.name, s.theta, psnr.get((dataset, s.digest, scale))) for s in here if s.nfe == nfe
                ]
                pool, pictures = self.session.pool, self.settings.pictures
                panels.append((dataset, Panel.sampled(pool, self.facts, spec, nfe, entries, pictures)))
        return panels

    def _write(self, scores: Sequence[Score], tables: Sequence[Table]) -> str:
        """Write the evaluation's files to the experiment's folder and to an MLflow run of their own."""
        log = self.tracker.run(self.experiment, "evaluation", f"evaluation of {self.config.name}", {ROLE: "report"})
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = write_tables(folder, scores, tables)
            upload(self.storage, self.folder, files, log)  # before samples, so that nothing can take them away
            panels = self._panels(scores)
            drawn = write_evaluation(folder, self.config, self.facts, scores, tables, panels, self.announce)
            upload(self.storage, self.folder, drawn, log)
            keep_only(self.storage, self.folder, {file.name for file in [*files, *drawn]})
        log.finish({"solvers": len(self.solvers), "scores": len(scores)})
        return self.storage.location(f"{self.folder}/report.html")

    # ---- MLflow -----------------------------------------------------------------------------------------------

    def _log(self, scores: Sequence[Score]) -> None:
        """Log the scores of each theta on its own run, and curves over NFE on the summary run of each solver."""
        by_solver: dict[tuple[str, str, float], list[Score]] = {}
        by_name: dict[tuple[str, float], list[Score]] = {}
        for score in scores:
            solver = score.case.solver
            if np.isfinite(score.summary.mean) and not score.is_exact:
                by_solver.setdefault(solver.identity, []).append(score)
                by_name.setdefault((solver.name, solver.guidance_scale), []).append(score)
        for group in by_solver.values():
            self._log_scores(group)
        summaries = self._summary_runs()
        for (title, scale), group in by_name.items():
            name = title if scale == 1 else f"{title}, guidance {scale:g}"
            log = summaries.get(name)
            if log is None:
                key = f"evaluation-summary/{title}/{scale:g}"
                log = self.tracker.run(self.experiment, key, name, {ROLE: "evaluation summary"})
            curves: dict[str, list[tuple[int, float]]] = {}
            for score in group:
                curves.setdefault(f"{_metric(score)}_vs_nfe", []).append((round(score.nfe), score.summary.mean))
            log.curves_once("curves", curves)
            log.finish({})

    def _log_scores(self, scores: Sequence[Score]) -> None:
        solver = scores[0].case.solver
        values: dict[str, list[tuple[int, float]]] = {}
        for score in scores:
            values[_metric(score)] = [(0, score.summary.mean)]
            if np.isfinite(score.summary.stderr):
                values[f"{_metric(score)}_stderr"] = [(0, score.summary.stderr)]
        if solver.run_id is not None:
            RunLog(self.tracker.client, solver.run_id).curves_once("scores", values)
            return
        # Two solvers may have the same theta, so the key contains the name as well.
        key = f"evaluation/{solver.name}/{solver.digest}/{solver.guidance_scale:g}"
        # The NFE of ground truth depends on the samples, and an MLflow parameter cannot change.
        nfe = "adaptive" if solver.nfe is None else str(solver.nfe)
        name = solver.name if solver.nfe is None else f"{solver.name} nfe{nfe}"
        log = self.tracker.run(self.experiment, key, name, {ROLE: "evaluation", "bespoke.nfe": nfe})
        log.parameters({"label": solver.name, "guidance_scale": solver.guidance_scale})
        texts = {}
        if solver.artifact is not None:
            log.tags({THETA: solver.artifact.digest, "bespoke.theta": solver.origin or ""})
            texts = {THETA_FILE: solver.artifact.to_json()}
        log.curves_once("scores", values)
        log.finish({"nfe": scores[0].nfe}, texts=texts)

    def _summary_runs(self) -> dict[str, RunLog]:
        """Summary runs, by name, of the newest sweep that one of the theta comes from."""
        sweeps = [run.data.tags[SWEEP] for run in self.runs.values() if SWEEP in run.data.tags]
        if not sweeps:
            return {}
        runs = self.tracker.runs_of(self.experiment, sweeps[0], "summary")
        return {run.info.run_name: RunLog(self.tracker.client, run.info.run_id) for run in runs.values()}


def _metric(score: Score) -> str:
    """Name of a score in MLflow, with a slash for brackets: ``digits/fid/digits_cnn``."""
    return entity_name(f"{score.case.dataset}/{score.metric.metric.column.replace('[', '/').replace(']', '')}")


def _name(score: Score) -> str:
    return f"{score.case.solver.name} at NFE {score.nfe:.0f}"


def _distinctly_named(solvers: Sequence[EvaluatedSolver]) -> list[EvaluatedSolver]:
    """Append the origin to the names of solvers that share name and NFE, so that each has its own table row."""
    names = Counter((s.name, s.nfe, s.guidance_scale) for s in solvers)
    renamed = []
    for number, solver in enumerate(solvers):
        if names[solver.name, solver.nfe, solver.guidance_scale] > 1:
            where = Path(solver.origin).name if solver.origin else str(number)
            solver = replace(solver, name=f"{solver.name} ({where}, {solver.digest[:6]})")
        renamed.append(solver)
    return renamed
