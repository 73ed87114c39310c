"""Results of sweep points, and the rows that tables and figures are made of.

A result is complete once its ``result.json`` exists; theta and the iterates are written before it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.storage import Storage

Kind = Literal["common grid", "best grid", "start", "learned", "ground truth"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one point.

    Attributes:
        key: Key of the point.
        point: The point, as a dictionary.
        name: Display name of the point.
        kind: Kind of the row that it makes.
        label: Family label.
        grid: Label of the chosen grid, or of a learned solver's start.
        status: 'finished', 'diverged', 'stalled' (no step improves the loss any more) or 'stopped' (early, by the
            search).
        reason: Why it stalled, else None.
        validation_psnr_db: PSNR on the validation pairs, dB; solvers are chosen by it.
        metrics: Column to {mean, stderr, count, not_finite} on the test pairs.
        start_metrics: The same, for a learned solver's start.
        start_validation_psnr_db: Validation PSNR of a learned solver's start.
        forwards: Network forwards spent on distillation or grid search, validation included.
        backwards: Network backwards spent.
        history: [iteration, validation PSNR] of every validation.
        chosen_grid: The chosen grid, as a dictionary; None for learned solvers.
    """

    key: str
    point: dict[str, Any]
    name: str
    kind: Kind
    label: str
    grid: str
    status: str
    validation_psnr_db: float
    metrics: dict[str, dict[str, float]]
    start_metrics: dict[str, dict[str, float]] | None = None
    start_validation_psnr_db: float | None = None
    forwards: int = 0
    backwards: int = 0
    history: list[list[float]] = field(default_factory=list)
    chosen_grid: dict[str, Any] | None = None
    reason: str | None = None


class ResultStore:
    """The folder of one point: its state while it runs, then theta and the result."""

    def __init__(self, storage: Storage, key: str):
        self.storage = storage
        self.folder = f"points/{key}"

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}"

    @property
    def theta_key(self) -> str:
        return self._key("theta.json")

    @property
    def theta_location(self) -> str:
        """The full location of theta, for users."""
        return self.storage.location(self.theta_key)

    def is_complete(self) -> bool:
        return all(self.storage.exists(key) for key in (self._key("result.json"), self.theta_key))

    def load(self) -> Result:
        return Result(**self.storage.read_json(self._key("result.json")))

    def save(self, result: Result, theta: str, iterates: list[dict[str, Any]]) -> None:
        """Write a finished point: theta and the validated iterates first, the result last."""
        self.storage.write(self.theta_key, theta.encode())
        if iterates:
            self.storage.write_json(self._key("iterates.json"), iterates)
        self.storage.write_json(self._key("result.json"), asdict(result))
        self.storage.delete(self._key("state.json"))

    def load_state(self) -> dict[str, Any] | None:
        """The state left by an interrupted trial, or None."""
        key = self._key("state.json")
        return self.storage.read_json(key) if self.storage.exists(key) else None

    def save_state(self, state: dict[str, Any]) -> None:
        self.storage.write_json(self._key("state.json"), state)

    def mark_stopped(self) -> None:
        """Record that the search ended this point early. Its last state is its result, even after a restart."""
        self.storage.write_json(self._key("stopped.json"), {"stopped": True})

    def is_stopped(self) -> bool:
        return self.storage.exists(self._key("stopped.json"))

    def read_theta(self) -> str:
        return self.storage.read(self.theta_key).decode()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One solver in a comparison: the chosen point of each seed, averaged over seeds.

    Attributes:
        label, kind, nfe, guidance_scale: Identify the solver.
        sigma0, detail: Preconditioning, and grid or start, of the best seed's chosen point.
        metrics: Column to mean over seeds.
        not_finite: Number of samples, over all seeds, whose PSNR is infinite or NaN; the means exclude them.
        stderr: Column to standard error: over seeds if there are several, else over samples.
        seeds: Number of seeds.
        forwards, backwards: Mean network passes spent on the chosen points.
        keys: Keys of the chosen points, the best seed on validation pairs first.
    """

    label: str
    kind: Kind
    nfe: int
    guidance_scale: float
    sigma0: float
    detail: str
    metrics: dict[str, float]
    not_finite: int = 0
    stderr: dict[str, float]
    seeds: int
    forwards: float
    backwards: float
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The solver's name in tables: its label, marked if the row is a best grid or a start."""
        return {"best grid": f"{self.label}, best grid", "start": f"start of {self.label}"}.get(self.kind, self.label)


def rows(results: Iterable[Result]) -> list[Row]:
    """Rows of the comparison, by guidance scale, NFE and PSNR.

    In each cell and seed, the point of highest *validation* PSNR is chosen; the row reports its scores on test pairs.
    """
    cells: dict[tuple[str, Kind, int, float], dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        point = result.point
        cells[result.label, result.kind, point["nfe"], point["guidance_scale"]][point["seed"]].append(result)
    comparison = []
    for (label, kind, nfe, scale), by_seed in cells.items():
        # The seed of highest validation PSNR comes first; callers that want a single solver take that one.
        chosen = sorted((max(points, key=_validation) for points in by_seed.values()), key=_validation, reverse=True)
        comparison.append(_row(label, kind, nfe, scale, chosen, [c.metrics for c in chosen]))
        starts = [c.start_metrics for c in chosen if c.start_metrics is not None]
        if len(starts) == len(chosen):
            comparison.append(_row(label, "start", nfe, scale, chosen, starts))
    return sorted(comparison, key=lambda row: (row.guidance_scale, row.nfe, row.metrics.get("psnr_db", -math.inf)))


def _validation(result: Result) -> float:
    return result.validation_psnr_db if math.isfinite(result.validation_psnr_db) else -math.inf


def _row(
    label: str,
    kind: Kind,
    nfe: int,
    scale: float,
    chosen: Sequence[Result],
    metrics: Sequence[dict[str, dict[str, float]]],
) -> Row:
    first = chosen[0]
    has_cost = kind != "start"
    return Row(
        label=label,
        kind=kind,
        nfe=nfe,
        guidance_scale=scale,
        sigma0=first.point["sigma0"],
        detail=first.grid,
        metrics={column: statistics.fmean(m[column]["mean"] for m in metrics) for column in metrics[0]},
        not_finite=int(sum(m.get("psnr_db", {}).get("not_finite", 0) for m in metrics)),
        stderr={column: _stderr([m[column] for m in metrics]) for column in metrics[0]},
        seeds=len(chosen),
        forwards=statistics.fmean(c.forwards for c in chosen) if has_cost else 0,
        backwards=statistics.fmean(c.backwards for c in chosen) if has_cost else 0,
        keys=tuple(c.key for c in chosen),
    )


def _stderr(summaries: Sequence[dict[str, float]]) -> float:
    means = {summary["mean"] for summary in summaries}
    if len(means) == 1:  # one seed, or a result that does not depend on the seed, such as a start
        return summaries[0]["stderr"]
    return statistics.stdev(s["mean"] for s in summaries) / math.sqrt(len(summaries))
