"""MLflow runs of a distillation: one of the command, and below it one per solver, as those of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.pairs.store import PairStore
from orchestrator.reports.distillation import Learned, table_of
from orchestrator.results.store import Kind, Result, rows
from orchestrator.storage import digest_of
from solvers.theta import ThetaArtifact
from sweeps.artifact import theta_artifact
from sweeps.bills import fact_tags
from sweeps.distil.outcome import DistilOutcome
from sweeps.point import RESULT_FORMAT, SolverChoice
from sweeps.session import Session

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import RunLog


def track(
    session: Session, learned: Sequence[Learned], outcome: DistilOutcome, files: Sequence[Path], *, seed: int
) -> str:
    """Write the runs of a distillation; returns the id of the command's run.

    `bespoke compare`, `register`, `evaluate` and `ui` find them as they find those of a sweep.

    Args:
        session: The session.
        learned: The thetas.
        outcome: What the distillation has left.
        files: Files of the report.
        seed: Seed of the distillation.
    """
    from orchestrator.tracking.mlflow import DESCRIPTION, ROLE, UPDATED
    from orchestrator.tracking.records import read_run, write_result, write_summaries

    tracker, experiment = session.open_tracking()
    facts, config = session.facts, session.config
    # Thetas of one model, from one noise, under one condition, share a run, whichever command distilled them.
    comparable = digest_of([facts.digest, config.conditioning.model_dump(), config.pairs.seed, RESULT_FORMAT])
    parent = tracker.run(experiment, f"distil/{comparable}", config.name, {ROLE: "sweep"})
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    parent.tags({"bespoke.model": facts.name, "bespoke.model_digest": facts.digest, UPDATED: now})
    _record_pairs(session, parent, learned)
    recorded = tracker.runs_of(experiment, parent.run_id, "trial")
    for one in learned:
        chosen = outcome.results[one.nfe]
        location = session.storage.location(f"{session.folder}/distil/{one.file}")
        scales = one.by_scale or {one.theta.guidance_scale: one.psnr_db}
        written = [
            (_result(one, "learned", "BNS", scale, psnr, outcome, seed), one.theta, location)
            for scale, psnr in scales.items()
        ]
        if not one.by_scale:  # of a range, only the mean of the fixed solver's PSNR is known
            fixed = _fixed_theta(session, one, chosen.best_fixed, one.theta.guidance_scale)
            label, scale = chosen.best_fixed.label, one.theta.guidance_scale
            written.append((_result(one, "best grid", label, scale, one.fixed_psnr_db, outcome, seed), fixed, "—"))
        for result, theta, place in written:
            if result.key in recorded:  # by an earlier command with the same settings
                continue
            log = tracker.trial_run(experiment, parent.run_id, result.key, result.name, _parameters(result, one))
            if result.history:
                log.curve("validation_psnr_db", [(int(step), value) for step, value in result.history])
            write_result(log, result, theta.to_json(), place)
    results = [read_run(run)[0] for run in tracker.runs_of(experiment, parent.run_id, "trial").values()]
    write_summaries(tracker, experiment, parent.run_id, rows(results))
    description = f"# {config.name}\n\n{table_of(learned).markdown()}\n{outcome.bill.markdown()}"
    parent.tags({DESCRIPTION: description} | fact_tags(outcome.truths, outcome.bill))
    for file in files:
        parent.file(file)
    parent.finish({"solvers": len(results)})
    return parent.run_id


def _record_pairs(session: Session, parent: RunLog, learned: Sequence[Learned]) -> None:
    """Record the validation pairs as inputs of the command's run."""
    names = {(scale, name) for one in learned for scale, name in one.pairs.items()}
    for scale, name in sorted(names):
        folder = PairStore.open(session.storage, name).folder
        parent.pairs(f"validation pairs, guidance {scale:g}", name, session.storage.location(folder), "validation")


def _fixed_theta(session: Session, one: Learned, choice: SolverChoice, scale: float) -> ThetaArtifact:
    return theta_artifact(
        session.facts,
        session.pool,
        one.fixed,
        family=choice.family,
        start=None,
        guidance_scale=scale,
        sigma0=1.0,
        pairs=None,
        validation_psnr_db=one.fixed_psnr_db,
    )


def _result(
    one: Learned, kind: Kind, label: str, scale: float, psnr: float, outcome: DistilOutcome, seed: int
) -> Result:
    """A solver as a result of a sweep; its metrics are those on the validation pairs, without standard errors."""
    learned = kind == "learned"
    guided = "" if scale == 1 else f" g{scale:g}"
    has_start = learned and not one.by_scale
    start = {"psnr_db": {"mean": one.start_psnr_db, "stderr": math.nan}}
    evaluations = one.history[-1][0] - one.history[0][0] if one.history and learned else 0
    point: dict[str, Any] = {
        "family": one.theta.family if learned else outcome.results[one.nfe].best_fixed.family,
        "nfe": one.nfe,
        "guidance_scale": scale,
        "sigma0": 1.0,
        "seed": seed,
    }
    return Result(
        key=digest_of([outcome.key, one.nfe, scale, kind]),
        point=point,
        name=f"{label} nfe{one.nfe}{guided}" + (f" from {one.start_name}" if learned else f" {kind}"),
        kind=kind,
        label=label,
        grid=f"from {one.start_name}" if learned else one.fixed_name,
        status=one.status if learned else "finished",
        validation_psnr_db=psnr,
        metrics={"psnr_db": {"mean": psnr, "stderr": math.nan}},
        start_metrics=start if has_start else None,
        start_validation_psnr_db=one.start_psnr_db if has_start else None,
        forwards=evaluations * outcome.bill.forwards_per_evaluation(scale),
        history=[list(entry) for entry in one.history] if learned else [],
    )


def _parameters(result: Result, one: Learned) -> dict[str, Any]:
    """A result as MLflow parameters, by which users sort and filter."""
    values = {**result.point, "label": result.label, "kind": result.kind, "pairs": "validation"}
    if result.kind != "learned":
        return values
    return values | {"start": one.start_name, "method": "levenberg_marquardt", "objective": "psnr"}
