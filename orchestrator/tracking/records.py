"""Writes results to MLflow runs and reads them back.

Everything that a comparison needs is in parameters and metrics, not in artifacts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.results.store import Result, ResultStore
from orchestrator.tracking.mlflow import THETA, THETA_FILE, entity_name
from solvers.theta import ThetaArtifact

if TYPE_CHECKING:
    from mlflow.entities import Run

    from orchestrator.tracking.mlflow import RunLog

START = "start_"
STDERR = "_stderr"
NOT_FINITE = "_not_finite"
BEST_VALIDATION = "best_validation_psnr_db"


def write_run(log: RunLog, result: Result, store: ResultStore) -> None:
    """Write a result and its theta to a run, and close the run."""
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
    theta = store.read_theta()
    log.tags({THETA: ThetaArtifact.from_json(theta, origin=store.theta_location).digest})
    log.finish(
        metrics,
        texts={THETA_FILE: theta},
        parameters={"grid": result.grid, "status": result.status, "theta": store.theta_location}
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
