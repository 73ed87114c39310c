"""The main job: pairs, then the sweep with Ray Tune, then MLflow and the report. It can be resumed at any point.

There are two rounds of trials: fixed families first, since a distillation may start from the best of them. Nothing
complete is computed again; a pair store is complete once it has a manifest, a point once it has a result.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

from orchestrator.cluster.system_metrics import SystemMetrics
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import Failure
from orchestrator.log import record
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pool.queue import SLOTS
from orchestrator.progress import Note, bar, note, stage
from orchestrator.reports.bill import gallery_cost
from orchestrator.reports.gallery import make_gallery
from orchestrator.reports.sweep import markdown_table, write_report, write_tables
from orchestrator.results.bill import Bill, guided
from orchestrator.results.store import Result, ResultStore, Row, rows
from orchestrator.results.truth import Truth, find_truths
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import DESCRIPTION, ROLE, UPDATED, RunLog
from orchestrator.tracking.records import write_run, write_summaries
from solvers.grids import Grid
from sweeps.bills import charge_gallery, fact_tags, opening_bill
from sweeps.cell_scheduler import asha_per_cell
from sweeps.point import RESULT_FORMAT, AnyPoint, FixedPoint, LearnedPoint, SolverChoice, point_from_dict
from sweeps.points.execute import TrialContext, mlflow_parameters, stored_result
from sweeps.points.runner import TRIALS, end_runners, start_runners
from sweeps.points.trial import FAILURE, follow, trial
from sweeps.ray_session import RaySession
from sweeps.session import keep_only, upload
from sweeps.space import check_pairs, fixed_points, learned_points
from sweeps.trial_progress import TrialProgress

MAX_TRIAL_FAILURES = 2

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Otherwise Tune would swallow the first Ctrl-C, and continue if its last trial had just ended. Stopping at once is
    # safe, because completed work is stored.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the progress bar replaces Tune's tables
}
"""Environment variables that Tune reads when it starts."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """Result of a sweep.

    Attributes:
        rows: Rows of the comparison table.
        report: Location of ``report.html``.
        thetas: Folder of the best learned solvers, one theta per file; None if none was learned.
        failed: Names of points that could not be finished, with the reason.
        log: Location of the log with the details of failures; None if nothing was logged.
        truths: Facts about the ground truth of the test pairs, by guidance scale.
        bill: What the results cost.
    """

    rows: list[Row]
    report: str
    thetas: str | None
    failed: dict[str, str]
    log: str | None
    truths: dict[float, Truth]
    bill: Bill


def run_sweep(
    config: ExperimentConfig, *, address: str | None, wait: bool, force: bool = False, announce: Note = note
) -> SweepOutcome:
    """Run or resume an experiment, up to its report.

    Args:
        config: A checked configuration.
        address, wait, force, announce: As for :class:`~sweeps.ray_session.RaySession`.

    Raises:
        UserError: Something in the configuration or the environment cannot work.
    """
    settings: dict[str, Any] = {"address": address, "wait": wait, "force": force, "announce": announce}
    with RaySession(config, **settings, command="sweep", locked=True) as session:
        check_pairs(config, session.facts.shape, announce)
        for metric in config.metrics:
            MetricSpec(metric).check_samples(session.facts.kind, session.facts.shape, None, config.pairs.test)
        # Before the long work, so that an unreachable tracking store is detected now.
        sweep = _Sweep(session, announce)
        try:
            with SystemMetrics(session.tracking_uri, sweep.parent.run_id) as machines:
                session.make_pairs(session.specs.values())
                machines.look()
                return sweep.run()
        except KeyboardInterrupt:
            sweep.parent.finish({}, status="KILLED")
            raise
        finally:
            sweep.close()


class _Sweep:
    """One run of the main job."""

    def __init__(self, session: RaySession, announce: Note):
        self.session, self.folder, self.announce = session, session.folder, announce
        self.config, self.storage = session.config, session.storage
        self.tracker, self.experiment = session.open_tracking()
        self.parent = self._parent()
        self.context = TrialContext(
            storage=self.storage.root,
            tracking_uri=session.tracking_uri,
            experiment_id=self.experiment,
            parent_run_id=self.parent.run_id,
            pool=session.pool_name,
            hosts=self.config.resources.hosts,
            facts=session.facts,
            checkpoint=self.config.resources.checkpoint,
        )
        self.failed: dict[str, str] = {}
        self.reused: set[str] = set()  # keys of the points that were complete before

    def _parent(self) -> RunLog:
        """The MLflow run of the sweep, shared by all sweeps of this name whose results are comparable.

        Results are comparable on the same validation and test pairs. With other pairs the sweep gets a new run, and
        `compare` shows the newest one.
        """
        facts = self.session.facts
        scored = sorted(spec.name for key, spec in self.session.specs.items() if key.split != "train")
        comparable = hashlib.sha256(repr((facts.digest, scored, RESULT_FORMAT)).encode()).hexdigest()[:12]
        parent = self.tracker.run(self.experiment, f"sweep/{comparable}", self.config.name, {ROLE: "sweep"})
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        parent.tags({"bespoke.model": facts.name, "bespoke.model_digest": facts.digest, UPDATED: now})
        for (split, scale, seed), spec in self.session.specs.items():
            location = self.storage.location(PairStore(self.storage, spec).folder)
            name = f"{split} pairs, guidance {scale:g}" + (f", seed {seed}" if split == "train" else "")
            parent.pairs(name, spec.name, location, split)
        return parent

    def run(self) -> SweepOutcome:
        fixed = fixed_points(self.config, self.session.specs)
        results = self._finish(fixed, "fixed solvers")
        best = best_choices(fixed, results)
        learned = learned_points(self.config, self.session.specs, best, self.session.facts.scheduler, self._no_start)
        results |= self._finish(learned, "distillation")
        points = by_key(fixed, learned)
        pairs = [f"pairs/{spec.digest}" for spec in self.session.specs.values()]
        self.session.record_needs([*pairs, *(f"points/{key}" for key in points)], add=False)
        ordered = [results[key] for key in points if key in results]
        table = rows(ordered)
        self._record_all(points, results)
        thetas = self._publish_thetas(table)
        write_summaries(self.tracker, self.experiment, self.parent.run_id, table)
        truths = self._truths()
        report = self.storage.location(f"{self.folder}/report.html")
        self.parent.tags({DESCRIPTION: _description(self.config.name, table, report, truths)})
        with stage("writing the report"):
            bill = self._report(table, ordered, truths)
        self.parent.tags({DESCRIPTION: _description(self.config.name, table, report, truths, bill)})
        status = "FAILED" if self.failed else "FINISHED"
        self.parent.tags(fact_tags(truths, bill))
        self.parent.finish({"solvers": len(ordered), "failed": len(self.failed)}, status=status)
        return SweepOutcome(
            rows=table,
            report=report,
            thetas=thetas,
            failed=self.failed,
            log=self.session.log.location,
            truths=truths,
            bill=bill,
        )

    def _truths(self) -> dict[float, Truth]:
        """Facts about the ground truth of the test pairs, by guidance scale."""
        tests = {scale: spec for (split, scale, _), spec in self.session.specs.items() if split == "test"}
        with stage("measuring the accuracy of ground truth"):
            return find_truths(self.storage, self.session.pool, tests, self.announce)

    def close(self) -> None:
        """Stop the runners, if any were started."""
        if "runners" in vars(self):
            end_runners(self.runners)

    def _no_start(self, distillation: str) -> None:
        self.failed[distillation] = "no fixed solver that it can start from has finished"

    def _finish(self, points: Sequence[AnyPoint], description: str) -> dict[str, Result]:
        """Results of these points. Missing ones are computed with Tune."""
        points = list(by_key(points).values())
        stores = {point.key: ResultStore(self.storage, point.key) for point in points}
        self.session.record_needs(store.folder for store in stores.values())
        pending = [point for point in points if not stores[point.key].is_complete()]
        self.reused |= {point.key for point in points} - {point.key for point in pending}
        if len(pending) < len(points):
            self.announce(f"{description}: {len(points) - len(pending)} of {len(points)} points are complete, reused")
        if pending:
            failures = self._tune(pending, description)
            for point in pending:
                if stores[point.key].is_stopped() and not stores[point.key].is_complete():
                    try:
                        follow(point.to_dict(), self.runners, lambda values: None)
                    except Exception as error:
                        failures[point.key] = Failure.of(error)
                if stores[point.key].is_complete():
                    continue
                failure = failures.get(point.key, Failure("Ray Tune ended without a result", ""))
                self.failed[point.name] = failure.reason.removeprefix(f"{point.name} ")
                record(point.name, failure.details)
                self._trial_run(point).finish({}, status="FAILED")
        return {p.key: stored_result(stores[p.key], p) for p in points if stores[p.key].is_complete()}

    def _tune(self, points: Sequence[AnyPoint], description: str) -> dict[str, Failure]:
        """Run these points as trials; returns why some failed, by key."""
        search, resources = self.config.search, self.config.resources
        scheduler = None
        learned = [point for point in points if isinstance(point, LearnedPoint)]
        if search.scheduler == "asha" and learned:
            longest = max(point.iterations // point.validate_every for point in learned)
            scheduler = asha_per_cell(
                search.grace_validations,
                search.reduction_factor,
                longest,
                lambda config: point_from_dict(config["point"]).cell,
                partial(_mark_stopped, self.storage),  # not a method of the sweep, because Tune pickles it
            )
        for variable, value in TUNE_SETTINGS.items():
            os.environ.setdefault(variable, value)
        unit = "iteration" if learned else "solver"
        # On this machine, not in the storage: Tune's files hold nothing that is needed later, but the storage's keys.
        folder = tempfile.TemporaryDirectory(prefix="bespoke-tune-")
        with folder, bar(sum(point.iterations for point in points), unit, description) as progress:
            tuner = Tuner(
                tune.with_resources(tune.with_parameters(trial, runners=self.runners), {"cpu": resources.trial_cpus}),
                param_space={"point": tune.grid_search([point.to_dict() for point in points])},
                tune_config=TuneConfig(
                    scheduler=scheduler,
                    reuse_actors=True,
                    trial_dirname_creator=_trial_name,
                    max_concurrent_trials=self.trials_at_once,
                ),
                run_config=RunConfig(
                    name=self.config.name,
                    storage_path=folder.name,
                    failure_config=FailureConfig(max_failures=MAX_TRIAL_FAILURES),
                    checkpoint_config=CheckpointConfig(checkpoint_frequency=0),
                    callbacks=[TrialProgress(progress, points)],
                    verbose=0,
                ),
            )
            grid = tuner.fit()
        failures = {}
        for result in grid:
            if result.config is not None and (failure := _failure(result)) is not None:
                failures[point_from_dict(result.config["point"]).key] = failure
        return failures

    @cached_property
    def runners(self) -> list[Any]:
        """Actors that compute the results of points, enough for the concurrent trials. Started on first use."""
        resources = self.config.resources
        free = ray.cluster_resources().get("CPU", 0.0) - resources.hosts * resources.host_cpus
        at_once = min(self.trials_at_once, max(free / resources.trial_cpus, 1))
        wait_for_tune = self.config.search.scheduler == "asha"
        return start_runners(math.ceil(at_once / TRIALS), self.context, wait_for_tune=wait_for_tune)

    @property
    def trials_at_once(self) -> int:
        """Number of trials that the hosts can serve at once. More would wait, and an autoscaler would add nodes."""
        resources = self.config.resources
        return resources.hosts * SLOTS * resources.batch_runs

    def _trial_run(self, point: AnyPoint) -> RunLog:
        return self.tracker.trial_run(
            self.experiment, self.parent.run_id, point.key, point.name, mlflow_parameters(point)
        )

    def _record_all(self, points: dict[str, AnyPoint], results: dict[str, Result]) -> None:
        """Ensure every result has a finished run, even if it comes from another sweep or MLflow was unreachable."""
        recorded = self.tracker.runs_of(self.experiment, self.parent.run_id, "trial")
        for key, result in results.items():
            run = recorded.get(key)
            renamed = run is not None and run.data.params.get("label") != result.label
            if run is not None and renamed:  # MLflow refuses to change a parameter
                self.tracker.delete(run)
            if run is None or renamed:
                log = self._trial_run(points[key])
                log.curve("validation_psnr_db", [(int(step), value) for step, value in result.history])
                write_run(log, result, ResultStore(self.storage, key))

    def _report(self, table: Sequence[Row], results: Sequence[Result], truths: Mapping[float, Truth]) -> Bill:
        """Write tables and then the report to the experiment's folder and the parent run; returns the bill."""
        facts, specs = self.session.facts, self.session.specs
        tests = {scale: spec for (split, scale, _), spec in specs.items() if split == "test"}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tables = write_tables(folder, table)
            upload(self.storage, self.folder, tables, self.parent)  # before samples, so that nothing can take them away
            begin = time.monotonic()
            panels = make_gallery(self.session.pool, self.storage, tests, table, facts)
            bill = opening_bill(self.session, self._named_pairs(), truths.values())
            bill.add_results(self.storage, results, self.reused)
            charge_gallery(bill, gallery_cost(panels, facts.forwards_per_evaluation, time.monotonic() - begin))
            files = write_report(
                folder,
                self.config,
                facts,
                specs.values(),
                table,
                results,
                panels,
                self.announce,
                truths=truths,
                bill=bill,
            )
            upload(self.storage, self.folder, files, self.parent)
            keep_only(self.storage, self.folder, {file.name for file in [*tables, *files]})
        return bill

    def _named_pairs(self) -> dict[str, PairSpec]:
        """The pair sets by what they are for."""
        seeds = len(self.config.seeds) > 1
        return {
            f"{split}{guided(scale)}" + (f", seed {seed}" if seeds and split == "train" else ""): spec
            for (split, scale, seed), spec in self.session.specs.items()
        }

    def _publish_thetas(self, table: Sequence[Row]) -> str | None:
        """Copy the chosen learned solvers to readable file names; returns their folder, or None if there are none."""
        folder = f"{self.folder}/thetas"
        published = set()
        for row in table:
            if row.kind == "learned":
                guided = "" if row.guidance_scale == 1 else f"-guidance{row.guidance_scale:g}"
                label = re.sub(r"[^a-z0-9]+", "-", row.label.lower()).strip("-")
                name = f"{label}-nfe{row.nfe}{guided}.json"
                theta = ResultStore(self.storage, row.keys[0]).read_theta()
                self.storage.write(f"{folder}/{name}", theta.encode())
                published.add(name)
        keep_only(self.storage, folder, published)
        return self.storage.location(folder) if published else None


def by_key(*rounds: Sequence[AnyPoint]) -> dict[str, AnyPoint]:
    """All points by key. A named start may coincide with 'best'; the two are then one point and one run."""
    return {point.key: point for points in rounds for point in points}


def best_choices(
    points: Sequence[FixedPoint], results: dict[str, Result]
) -> dict[tuple[int, float, float], list[SolverChoice]]:
    """Fixed solvers by (nfe, guidance scale, sigma0), highest validation PSNR first."""
    candidates: dict[tuple[int, float, float], list[tuple[float, SolverChoice]]] = {}
    for point in points:
        result = results.get(point.key)
        if result is None or result.chosen_grid is None:
            continue
        choice = SolverChoice(
            family=point.family, options=point.options, label=point.label, grid=Grid(**result.chosen_grid)
        )
        cell = (point.nfe, point.guidance_scale, point.sigma0)
        candidates.setdefault(cell, []).append((result.validation_psnr_db, choice))
    return {
        cell: [choice for _, choice in sorted(choices, key=lambda scored: -scored[0])]
        for cell, choices in candidates.items()
    }


def _description(
    name: str, table: Sequence[Row], report: str, truths: Mapping[float, Truth], bill: Bill | None = None
) -> str:
    """Description of the parent run in the UI: the comparison table, its ground truth, its bill, and where to look."""
    truth = "".join(f"Ground truth{guided(scale)}: {truth.sentence()}.\n\n" for scale, truth in truths.items())
    return (
        f"# {name}\n\n{markdown_table(table, truths)}\n{truth}"
        f"{'' if bill is None else bill.markdown() + chr(10)}"
        f"For curves against NFE, open the chart view of the experiment's runs. Figures, samples and `report.html` are "
        f"among this run's artifacts (also at {report}); a solver's theta is an artifact of its own run."
    )


def _failure(result: Any) -> Failure | None:
    """Why a trial failed; None if it did not."""
    if result.error is not None:
        cause = getattr(result.error, "cause", None)
        failure = Failure.of(cause if isinstance(cause, Exception) else result.error)
        return failure._replace(details=str(result.error))
    return Failure(*result.metrics[FAILURE]) if result.metrics and FAILURE in result.metrics else None


def _mark_stopped(storage: Storage, config: dict[str, Any]) -> None:
    ResultStore(storage, point_from_dict(config["point"]).key).mark_stopped()


def _trial_name(trial: Any) -> str:
    """Folder of a trial in Tune's results. It uses the key, since names of points are long."""
    return f"{point_from_dict(trial.config['point']).key}-{trial.trial_id}"
