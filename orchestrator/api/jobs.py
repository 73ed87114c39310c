"""``sweep`` and ``evaluate``: the main jobs of the command line, from a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import plugins
from orchestrator.api.display import html_table
from orchestrator.api.model import STORAGE, Model
from orchestrator.api.solver import Solver, load_theta
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import load_config
from orchestrator.errors import UserError
from orchestrator.metrics.base import shown_db
from solvers.families import LearnableFamily
from solvers.theta import ThetaArtifact

if TYPE_CHECKING:
    from orchestrator.results.bill import Bill
    from orchestrator.results.store import Row
    from sweeps.evaluate import EvaluationOutcome
    from sweeps.sweep import SweepOutcome

FAMILIES = ("euler", "midpoint", "ddim", "dpmpp_2m", "bns")
"""Families of a sweep by default."""


class Sweep:
    """The result of a sweep.

    Attributes:
        outcome: What the command line prints: rows, report, thetas, failures, bill.
        rows: The table's rows.
        solvers: The best learned solvers, by the name of their theta file.
    """

    def __init__(self, outcome: SweepOutcome, model: Model | None, storage: str):
        self.outcome = outcome
        self.rows: list[Row] = outcome.rows
        self.report: str = outcome.report
        self.bill: Bill = outcome.bill
        files = sorted(Path(outcome.thetas).glob("*.json")) if outcome.thetas and Path(outcome.thetas).is_dir() else []
        self.solvers = {file.stem: load_theta(file) for file in files}
        for solver in self.solvers.values():
            solver.model, solver.storage = model, storage

    def _cells(self) -> list[tuple[str, ...]]:
        ordered = sorted(self.rows, key=lambda row: (row.guidance_scale, row.nfe, -row.metrics["psnr_db"]))
        return [
            (row.name, str(row.nfe), f"{row.guidance_scale:g}", shown_db(row.metrics["psnr_db"], 2)) for row in ordered
        ]

    def _failures(self) -> list[str]:
        return [f"failed: {name}: {reason}" for name, reason in self.outcome.failed.items()]

    def __repr__(self) -> str:
        cells = self._cells()
        width = max((len(cell[0]) for cell in cells), default=0)
        lines = [f"  {name:<{width}}  NFE {nfe:>3}  guidance {scale:>3}  {psnr} dB" for name, nfe, scale, psnr in cells]
        rest = [*self._failures(), f"cost: {self.bill.sentence()}", f"report: {self.report}"]
        return "\n".join(["PSNR on test pairs", *lines, *rest])

    def _repr_html_(self) -> str:
        table = html_table(self._cells(), ("solver", "NFE", "guidance", "PSNR (dB)"), "PSNR on test pairs")
        rest = [*self._failures(), f"cost: {self.bill.sentence()}", f"report: {self.report}"]
        return table + html_table([(line,) for line in rest])


class Evaluation:
    """The result of an evaluation.

    Attributes:
        outcome: What the command line prints: scores, tables, report, failures.
        rows: One dictionary per solver, dataset and metric.
    """

    def __init__(self, outcome: EvaluationOutcome):
        from orchestrator.reports.tables import to_rows

        self.outcome = outcome
        self.rows: list[dict[str, Any]] = to_rows(outcome.scores)
        self.report: str = outcome.report

    def __repr__(self) -> str:
        failed = [f"failed: {name}: {reason}" for name, reason in self.outcome.failed.items()]
        return "\n".join([*(table.markdown() for table in self.outcome.tables), *failed, f"report: {self.report}"])

    def _repr_html_(self) -> str:
        tables = [
            html_table([[cell.text for cell in row] for row in table.rows], table.header, table.title)
            for table in self.outcome.tables
        ]
        return "\n".join(tables)


def sweep(
    model: Model | ExperimentConfig | str | Path,
    *,
    nfe: int | Sequence[int] = (8,),
    families: Sequence[str] = FAMILIES,
    storage: str | Path = STORAGE,
    address: str | None = None,
    tracking_uri: str | None = None,
    force: bool = False,
    **sections: Any,
) -> Sweep:
    """Distil and compare solvers of several families, on Ray: the whole grid of families, NFEs and guidance scales.

    It uses the Ray session that this process has, or starts one on this machine. The same call resumes it.

    Args:
        model: A model; a configuration, or the path of one in YAML, to which only ``address`` and ``force`` apply.
        nfe: Velocity evaluations per sample.
        families: Names of solver families; those that can learn are distilled.
        storage: Storage root of pairs and results.
        address: Ray cluster, 'auto' or host:port; None: that of this process, or a local one.
        tracking_uri: MLflow store; None: one under the storage root.
        force: Whether to go on with a model that its examination refuses.
        sections: Other keys of a configuration: ``pairs={"train": 64}``, ``guidance_scale=[1.0, 3.0]``, ``learned``,
            ``fixed``, ``resources`` and so on.

    Raises:
        UserError: Something in the configuration or the environment cannot work.
    """
    from sweeps.sweep import run_sweep

    if isinstance(model, Model):
        model.check_can_be_sent()
        described = {"nfe": [nfe] if isinstance(nfe, int) else list(nfe), **_split(families, sections)}
        config = model.config(storage=storage, **described, **_tracked(tracking_uri))
        owner: Model | None = model
    else:
        if sections:
            raise UserError(f"{', '.join(sections)} must be set in the configuration; only a Model takes them here")
        config = model if isinstance(model, ExperimentConfig) else load_config(model)
        config.check()
        owner = None if isinstance(model, ExperimentConfig) else Model.from_yaml(model)
    outcome = run_sweep(config, address=address, wait=True, force=force)
    return Sweep(outcome, owner, config.storage)


def _split(families: Sequence[str], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Families as the sections ``fixed`` and ``learned``, unless these are given, with the other sections."""
    learnable = [name for name in families if issubclass(plugins.load("families", name), LearnableFamily)]
    fixed = [name for name in families if name not in learnable]
    return {"fixed": fixed, "learned": learnable} | dict(sections)


def _tracked(tracking_uri: str | None) -> dict[str, str]:
    return {} if tracking_uri is None else {"tracking_uri": tracking_uri}


def evaluate(
    thetas: Solver | ThetaArtifact | str | Path | Sequence[Solver | ThetaArtifact | str | Path],
    model: Model,
    *,
    datasets: Mapping[str, Any] | None = None,
    metrics: Sequence[str | Mapping[str, Any]] = (),
    samples: int | None = None,
    baselines: Sequence[str] = (),
    storage: str | Path = STORAGE,
    address: str | None = None,
    tracking_uri: str | None = None,
    allow_transfer: bool = False,
    force: bool = False,
    **sections: Any,
) -> Evaluation:
    """Score solvers with metrics on datasets, on Ray. Values that were measured earlier are reused.

    Args:
        thetas: One or several: solvers, theta artifacts, or files.
        model: The model.
        datasets: Sources of conditions, and of real samples, by their names in tables: ``{"name": ..., "options":
            ...}`` each. None: what conditions the model.
        metrics: Names, or ``{"name": ..., "options": ...}``; by default psnr, snr and rmse.
        samples: Samples per solver and dataset; None: as many as there are test pairs.
        baselines: Fixed solvers that are scored too.
        storage, address, tracking_uri, force, sections: As for :func:`sweep`.
        allow_transfer: Whether to accept a theta that was made for another model.

    Raises:
        UserError, ValueError: Something cannot work, or a theta was made for another model.
    """
    from orchestrator.evaluation.check import check_evaluation
    from sweeps.evaluate import FoundTheta, evaluate_thetas

    given = [thetas] if isinstance(thetas, Solver | ThetaArtifact | str | Path) else list(thetas)
    found = [FoundTheta(*_named(number, one)) for number, one in enumerate(given)]
    if not found:
        raise UserError("nothing to evaluate: give a solver, a theta, or the path of one")
    evaluation: dict[str, Any] = {
        "metrics": list(metrics),
        "baselines": list(baselines),
        "datasets": dict(datasets or {}),
    }
    if samples is not None:
        evaluation["samples"] = samples
    model.check_can_be_sent()
    nfe = sorted({theta.artifact.nfe for theta in found})
    config = model.config(storage=storage, nfe=nfe, evaluation=evaluation, **sections, **_tracked(tracking_uri))
    check_evaluation(config)
    outcome = evaluate_thetas(config, found, address=address, wait=True, force=force, allow_transfer=allow_transfer)
    return Evaluation(outcome)


def _named(number: int, theta: Solver | ThetaArtifact | str | Path) -> tuple[str, ThetaArtifact]:
    """A theta with its origin."""
    if isinstance(theta, str | Path):
        return str(theta), load_theta(theta).theta
    artifact = theta.theta if isinstance(theta, Solver) else theta
    return f"theta {number + 1}", artifact
