"""Writes results to MLflow runs and reads them back.

Everything that a comparison needs is in parameters and metrics, not in artifacts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.results.store import Result, ResultStore, Row
from orchestrator.tracking.mlflow import THETA, THETA_FILE, entity_name
from solvers.theta import ThetaArtifact

if TYPE_CHECKING:
    from mlflow.entities import Run

    from orchestrator.tracking.mlflow import RunLog, Tracker

START = "start_"
STDERR = "_stderr"
NOT_FINITE = "_not_finite"
BEST_VALIDATION = "best_validation_psnr_db"


def write_run(log: RunLog, result: Result, store: ResultStore) -> None:
    """Write the result of a point and its theta to a run, and close the run."""
    write_result(log, result, store.read_theta(), store.theta_location)


def write_result(log: RunLog, result: Result, theta: str, location: str) -> None:
    """Write a result and its theta to a run, and close the run.

    Args:
        log: The run.
        result: The result.
        theta: theta as JSON.
        location: Where it is kept.
    """
    metrics: dict[str, float] = {
        BEST_VALIDATION: result.validation_psnr_db,
        "nfe": result.point["nfe"],
        "forwards": result.forwards,
        "backwards": result.backwards,
    }
    for prefix, summaries in (("", result.metrics), (START, result.start_metrics or {})):
        for column, summary in summaries.items():
            name = prefix + entity_name(column)
            metrics |= {name: summary["mean"], name + STDERR: summary["stderr"]}
            if summary.get("not_finite"):
                metrics[name + NOT_FINITE] = summary["not_finite"]
    if result.start_validation_psnr_db is not None:
        metrics[START + "validation_psnr_db"] = result.start_validation_psnr_db
    log.tags({THETA: ThetaArtifact.from_json(theta, origin=location).digest})
    log.finish(
        metrics,
        texts={THETA_FILE: theta},
        parameters={"grid": result.grid, "status": result.status, "theta": location}
        | ({"reason": result.reason} if result.reason else {}),
    )


def read_run(run: Run) -> tuple[Result, str]:
    """The result recorded by a finished run, and the location of its theta."""
    parameters = run.data.params
    # An evaluation later logs to the same run, with the dataset before a slash. The sweep's result excludes these.
    metrics = {name: value for name, value in run.data.metrics.items() if "/" not in name}

    def summaries(prefix: str) -> dict[str, dict[str, float]]:
        columns = [
            name.removesuffix(STDERR).removeprefix(prefix)
            for name in metrics
            if name.endswith(STDERR) and name.startswith(prefix) and (prefix or not name.startswith(START))
        ]
        suffixes = {"mean": "", "stderr": STDERR, "not_finite": NOT_FINITE}
        return {
            column: {
                name: metrics[prefix + column + suffix]
                for name, suffix in suffixes.items()
                if prefix + column + suffix in metrics
            }
            for column in columns
        }

    point: dict[str, Any] = {
        "family": parameters["family"],
        "nfe": int(parameters["nfe"]),
        "guidance_scale": float(parameters["guidance_scale"]),
        "sigma0": float(parameters["sigma0"]),
        "seed": int(parameters["seed"]),
    }
    result = Result(
        key=run.data.tags["bespoke.key"].rpartition("/")[2],
        point=point,
        name=run.info.run_name or run.info.run_id,
        kind=parameters["kind"],  # type: ignore[arg-type]
        label=parameters["label"],
        grid=parameters["grid"],
        status=parameters["status"],
        validation_psnr_db=metrics[BEST_VALIDATION],
        metrics=summaries(""),
        start_metrics=summaries(START) or None,
        start_validation_psnr_db=metrics.get(START + "validation_psnr_db"),
        forwards=int(metrics["forwards"]),
        backwards=int(metrics["backwards"]),
    )
    return result, parameters["theta"]


def write_summaries(tracker: Tracker, experiment: str, parent: str, table: Sequence[Row]) -> None:
    """Log one run per family and guidance, with PSNR at step = NFE, so that the UI can overlay the curves.

    Args:
        tracker: The MLflow store.
        experiment, parent: Ids of the experiment and of the command's run.
        table: The solvers. Runs about others, of an earlier command, are deleted.
    """
    series: dict[tuple[str, float], list[Row]] = {}
    for row in table:
        series.setdefault((row.name, row.guidance_scale), []).append(row)
    outdated = tracker.runs_of(experiment, parent, "summary")
    for (name, scale), members in series.items():
        numbers = [(row.nfe, column, row.metrics[column]) for row in members for column in row.metrics]
        key = f"summary/{name}/{scale:g}/{hashlib.sha256(repr(numbers).encode()).hexdigest()[:8]}"
        if outdated.pop(key, None) is not None:
            continue
        values = {"label": members[0].label, "kind": members[0].kind, "guidance_scale": scale}
        run_name = name if scale == 1 else f"{name}, guidance {scale:g}"
        log = tracker.summary_run(experiment, parent, key, run_name, values)
        for column in members[0].metrics:
            log.curve(f"{entity_name(column)}_vs_nfe", [(row.nfe, row.metrics[column]) for row in members])
        log.finish({})
    for run in outdated.values():
        tracker.delete(run)
