"""The search space: the points of an experiment, as pure functions of its configuration and the model facts.

A *point* is one trial. A *cell* is a (family, NFE, guidance scale, seed). Trials are compared only within a cell, since
PSNR rises with NFE and a search across cells would just pick the largest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey
from orchestrator.config.solvers import LEAST_SQUARES, GITSConfig
from orchestrator.hosts.runs import SETTINGS, LearnedRun, Settings
from orchestrator.pairs import PairSpec
from orchestrator.storage import digest_of
from solvers.distil.adam import AdamSettings
from solvers.families import GridSolver, LearnableFamily
from solvers.grids import Grid
from solvers.schedulers.base import Scheduler

RESULT_FORMAT = 1
"""Increment whenever the same point would give a different result. Earlier results are then recomputed."""


@dataclass(frozen=True, kw_only=True)
class SolverChoice:
    """A fully specified fixed solver, from which a distillation may start."""

    family: str
    options: dict[str, Any]
    label: str
    grid: Grid

    def solver(self, nfe: int, sigma0: float) -> GridSolver:
        return GridSolver(plugins.build("families", self.family, self.options), nfe, self.grid, sigma0)

    def may_start(self, learned: LearnableFamily, nfe: int, sigma0: float, scheduler: Scheduler) -> bool:
        """Whether ``learned`` can represent this solver, on this grid and path."""
        solver = self.solver(nfe, sigma0)
        if not learned.starts_from(solver.family):
            return False
        try:
            learned.start(solver, scheduler)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Point:
    """One fully specified trial. Equal points have equal results, in any experiment.

    Attributes:
        family, options, label: The family, its options, and its name in tables.
        nfe, guidance_scale, sigma0, seed: Position in the sweep.
        validation, test: Digests of the pair sets for selection and for reporting.
        metrics: Metrics on the test pairs.
        grids, gits: Candidate grids of a fixed family, and GITS settings for grids that are computed from the training
            pairs. The best on ``search_pairs`` validation pairs is taken. A single candidate is the common grid.
        search_pairs: See ``grids``.
        start: Solver from which a learned family starts.
        train: Digest of the training pairs; None if nothing is learned from them.
        settings: Settings of the method of a learned family.
        objective, objective_options: Objective that a learned family minimises.
        method: Method of a learned family: a key of :data:`orchestrator.hosts.runs.SETTINGS`.
        precision: Precision of the network during distillation.
        data_parallel: Whether every batch is split over all hosts.
        validate_every: Iterations between validations of a learned family.
        early_stopping: Whether the search may stop it early; its result is then not that of the full run.
        format: Version of the way results are computed.
    """

    family: str
    options: dict[str, Any]
    label: str
    nfe: int
    guidance_scale: float
    sigma0: float
    seed: int
    validation: str
    test: str
    metrics: tuple[str, ...]
    grids: tuple[Grid, ...] = ()
    gits: tuple[dict[str, Any], ...] = ()
    search_pairs: int = 0
    start: SolverChoice | None = None
    train: str | None = None
    method: str = "adam"
    settings: Settings | None = None
    objective: str = "psnr"
    objective_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "float32"
    data_parallel: bool = False
    validate_every: int = 0
    early_stopping: bool = False
    format: int = RESULT_FORMAT

    @property
    def kind(self) -> Literal["common grid", "best grid", "learned"]:
        if self.start is not None:
            return "learned"
        return "common grid" if len(self.grids) + len(self.gits) == 1 else "best grid"

    @property
    def key(self) -> str:
        """Name of the point's folder: a digest of everything its result depends on."""
        return digest_of(dataclasses.asdict(self))

    @property
    def cell(self) -> str:
        """Name of the point's cell. Only trials of the same cell are compared with each other."""
        return f"{self.label}/{self.kind}/nfe{self.nfe}/guidance{self.guidance_scale:g}/seed{self.seed}"

    def learned_run(self) -> LearnedRun:
        """The distillation run of a point with a learned family."""
        assert self.settings is not None
        assert self.train is not None
        return LearnedRun(
            family=self.family,
            options=self.options,
            sigma0=self.sigma0,
            train=self.train,
            settings=self.settings,
            objective=self.objective,
            objective_options=self.objective_options,
        )

    @property
    def name(self) -> str:
        """Display name, used for runs in MLflow."""
        parts = [self.label, f"nfe{self.nfe}"]
        if self.guidance_scale != 1:
            parts.append(f"g{self.guidance_scale:g}")
        if self.sigma0 != 1:
            parts.append(f"sigma0={self.sigma0:g}")
        if self.settings is not None and self.start is not None:
            rate = [f"lr{self.settings.learning_rate:g}"] if isinstance(self.settings, AdamSettings) else []
            parts += [*rate, f"from {self.start.label}", f"seed{self.seed}"]
        else:
            parts.append(self.kind)
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Point:
        values = dict(content)
        values["metrics"] = tuple(values["metrics"])
        values["grids"] = tuple(Grid(**grid) for grid in values["grids"])
        values["gits"] = tuple(values["gits"])
        if values["start"] is not None:
            values["start"] = SolverChoice(**{**values["start"], "grid": Grid(**values["start"]["grid"])})
        if values["settings"] is not None:
            values["settings"] = SETTINGS[values["method"]](**values["settings"])
        return cls(**values)


def fixed_points(config: ExperimentConfig, specs: Mapping[PairKey, PairSpec]) -> list[Point]:
    """Points of every fixed family at every NFE, guidance scale and sigma0, on the common grid and on the best one."""
    points = []
    for solver in config.fixed:
        for scale, nfe, sigma0 in itertools.product(
            config.guidance_scale, solver.nfes(config.nfe), config.fixed_sigma0
        ):
            common = Point(
                family=solver.family,
                options=solver.options,
                label=solver.label,
                nfe=nfe,
                guidance_scale=scale,
                sigma0=sigma0,
                seed=0,
                validation=specs[PairKey("validation", scale, 0)].digest,
                test=specs[PairKey("test", scale, 0)].digest,
                metrics=config.metrics,
            )
            train = PairKey("train", scale, config.seeds[0])
            points.append(_on_grids(common, [solver.grid], specs.get(train)))
            if config.grid_search is not None and solver.search:
                searched = min(config.grid_search.pairs, config.pairs.validation)
                best = _on_grids(common, config.grids(solver), specs.get(train))
                points.append(dataclasses.replace(best, search_pairs=searched))
    return points


def _on_grids(point: Point, grids: Sequence[Grid | GITSConfig], train: PairSpec | None) -> Point:
    """The point with these candidate grids. It depends on the training pairs only if a grid is computed from them."""
    fixed = tuple(grid for grid in grids if isinstance(grid, Grid))
    gits = tuple(grid.model_dump(exclude={"kind"}) for grid in grids if isinstance(grid, GITSConfig))
    digest = train.digest if gits and train is not None else None
    return dataclasses.replace(point, grids=fixed, gits=gits, train=digest)


def learned_points(
    config: ExperimentConfig,
    specs: Mapping[PairKey, PairSpec],
    best: Mapping[tuple[int, float, float], Sequence[SolverChoice]],
    scheduler: Scheduler,
) -> list[Point]:
    """Points of every learned family on all its axes, except those without a solver to start from.

    Args:
        config: The experiment.
        specs: Pair specs, see :func:`~orchestrator.config.pair_plan.pair_specs`.
        best: Fixed solvers by (nfe, guidance scale, sigma0), best on validation pairs first. 'start: best' means the
            first one that the family can start from.
        scheduler: Scheduler of the model's field.
    """
    points = []
    for learned in config.learned:
        family = learned.build()
        axes = (config.guidance_scale, config.nfe, config.seeds, learned.sigma0, learned.start)
        for scale, nfe, seed, sigma0, start in itertools.product(*axes):
            choice = _start(start, family, best, nfe, scale, sigma0, scheduler)
            if choice is None:
                continue
            points += [
                Point(
                    family=learned.family,
                    options=learned.options,
                    label=learned.label,
                    nfe=nfe,
                    guidance_scale=scale,
                    sigma0=sigma0,
                    seed=seed,
                    validation=specs[PairKey("validation", scale, 0)].digest,
                    test=specs[PairKey("test", scale, 0)].digest,
                    metrics=config.metrics,
                    start=choice,
                    train=specs[PairKey("train", scale, seed)].digest,
                    method=learned.method,
                    settings=settings,
                    objective=learned.objective.name,
                    objective_options=learned.objective.options,
                    precision=config.resources.precision,
                    data_parallel=learned.data_parallel,
                    validate_every=learned.run_length.validate_every,
                    early_stopping=config.search.scheduler == "asha",
                )
                for settings in learned.settings(seed, config.pairs.train, config.resources.precision)
            ]
    return points


def _start(
    name: str,
    family: LearnableFamily,
    best: Mapping[tuple[int, float, float], Sequence[SolverChoice]],
    nfe: int,
    scale: float,
    sigma0: float,
    scheduler: Scheduler,
) -> SolverChoice | None:
    """The solver to start from; None if ``name`` is 'best' and no suitable fixed solver has finished."""
    if name == "best":
        swept = {
            key: choice
            for key, choices in best.items()
            if key[:2] == (nfe, scale)
            and (choice := next((c for c in choices if c.may_start(family, nfe, sigma0, scheduler)), None)) is not None
        }
        return swept[min(swept, key=lambda key: abs(math.log(key[2] / sigma0)))] if swept else None
    if name == LEAST_SQUARES:
        return SolverChoice(family=LEAST_SQUARES, options={}, label="least squares", grid=Grid())
    # Any other name is a family, taken with its default options on the uniform grid, as in the papers.
    return SolverChoice(family=name, options={}, label=plugins.build("families", name).label, grid=Grid())
