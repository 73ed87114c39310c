"""Points of a sweep: everything that one result depends on. A point's key names its folder.

A *cell* is a (family, NFE, guidance scale, seed). Only points of one cell are compared with each other, since PSNR
rises with NFE and a search across cells would just pick the largest.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import plugins
from orchestrator.hosts.runs import LearnedRun
from orchestrator.storage import digest_of
from solvers.families import GridSolver, LearnableFamily
from solvers.grids import Grid
from solvers.schedulers.base import Scheduler

RESULT_FORMAT = 2
"""Increment whenever the same point would give a different result. Earlier results are then recomputed. It begins the
name of every point's folder."""

RACE_FORMAT = 2
"""Increment whenever the same race would choose differently. It is part of the keys of points with a race."""


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
class Point(ABC):
    """One fully specified result: a :class:`FixedPoint` or a :class:`LearnedPoint`.

    Equal points have equal results, in any experiment.

    Attributes:
        label: Name of the solver in tables; the result does not depend on it.
        nfe, guidance_scale, seed: Position in the sweep.
        validation, test: Names of the pairs (``PairSpec.name``) for selection and for reporting.
        metrics: Metrics on the test pairs.
        format: Version of the way results are computed.
    """

    label: str
    nfe: int
    guidance_scale: float
    seed: int
    validation: str
    test: str
    metrics: tuple[str, ...]
    format: int = RESULT_FORMAT

    @property
    @abstractmethod
    def kind(self) -> Literal["common grid", "best grid", "learned"]:
        """Which row of a table the result belongs to."""

    @property
    def key(self) -> str:
        """Name of the point's folder: the format, and a digest of everything its result depends on."""
        return f"v{self.format}-{digest_of(self.identity)}"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the content without names for display."""
        content = self.to_dict()
        del content["label"], content["objective_options"]  # objective_content covers them
        if content["race"]:
            content["race"] = RACE_FORMAT
        else:
            del content["race"]  # full searches were the only ones for a long time, and their results remain valid
        if content["start_format"] == 1:
            del content["start_format"]  # the only one for a long time
        if content["start"] is not None:
            content["start"] = {key: value for key, value in content["start"].items() if key != "label"}
        return content

    @property
    def iterations(self) -> int:
        """Length of its computation, for progress bars."""
        return 1

    @property
    def cell(self) -> str:
        """Name of the point's cell."""
        return f"{self.label}/{self.kind}/nfe{self.nfe}/guidance{self.guidance_scale:g}/seed{self.seed}"

    @property
    def name(self) -> str:
        """Display name, used for runs in MLflow."""
        content = self.to_dict()
        guided = [f"g{self.guidance_scale:g}"] if self.guidance_scale != 1 else []
        preconditioned = [f"sigma0={content['sigma0']:g}"] if content["sigma0"] != 1 else []
        return " ".join([self.label, f"nfe{self.nfe}", *guided, *preconditioned, *self._name_parts()])

    @abstractmethod
    def _name_parts(self) -> list[str]: ...

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Flat content, the same keys for both kinds. Inverse: :func:`point_from_dict`."""


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Point):
    """A fixed family on its best candidate grid.

    Attributes:
        family, options, sigma0: The family, its options, and its preconditioning.
        grids, gits: Candidate grids, and GITS settings for grids that are computed from the training pairs. The best on
            ``search_pairs`` validation pairs is taken. A single candidate is the common grid.
        search_pairs: See ``grids``.
        race: Whether the grids race on ever more of these pairs, instead of being scored on all of them.
        train: Name of the training pairs; None if no grid is computed from them.
    """

    family: str
    options: dict[str, Any]
    sigma0: float
    grids: tuple[Grid, ...] = ()
    gits: tuple[dict[str, Any], ...] = ()
    search_pairs: int = 0
    race: bool = False
    train: str | None = None

    @property
    def kind(self) -> Literal["common grid", "best grid", "learned"]:
        return "common grid" if len(self.grids) + len(self.gits) == 1 else "best grid"

    def _name_parts(self) -> list[str]:
        return [self.kind]

    def to_dict(self) -> dict[str, Any]:
        return {**_LEARNED_DEFAULTS, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LearnedPoint(Point):
    """A distillation run from one start.

    Attributes:
        run: The run: family, training pairs, method settings, objective.
        start: Solver from which the family starts.
        objective_content: Digest of the objective's options and weights (:attr:`Objective.content`); the options only
            say where they lie.
        precision: Precision of the network during distillation.
        compile: Whether the network is compiled for distillation, which rounds differently.
        data_parallel: Whether every batch is split over all hosts.
        validate_every: Iterations between validations.
        start_format: The family's :attr:`~solvers.families.base.LearnableFamily.start_format`.
        early_stopping: Settings of a search that may stop it early; its result is then not that of the full run. None:
            it runs to its end.
    """

    run: LearnedRun
    start: SolverChoice
    objective_content: str
    precision: str = "float32"
    compile: bool = False
    data_parallel: bool = False
    validate_every: int
    start_format: int = 1
    early_stopping: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "settings": self.run.method.identity}

    @property
    def family(self) -> str:
        return self.run.family

    @property
    def options(self) -> dict[str, Any]:
        return self.run.options

    @property
    def sigma0(self) -> float:
        return self.run.sigma0

    @property
    def iterations(self) -> int:
        return self.run.method.iterations

    @property
    def kind(self) -> Literal["common grid", "best grid", "learned"]:
        return "learned"

    def _name_parts(self) -> list[str]:
        short = self.run.method.short
        return [*([short] if short else []), f"from {self.start.label}", f"seed{self.seed}"]

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        run = content.pop("run")
        method = {"method": self.run.method.name, "settings": run.pop("method")}
        return {**_FIXED_DEFAULTS, **run, **method, **content}


_FIXED_DEFAULTS: dict[str, Any] = {"grids": (), "gits": (), "search_pairs": 0, "race": False}
_LEARNED_DEFAULTS: dict[str, Any] = {
    "start": None,
    "method": "adam",
    "settings": None,
    "objective": "psnr",
    "objective_options": {},
    "objective_content": "",
    "precision": "float32",
    "compile": False,
    "data_parallel": False,
    "validate_every": 0,
    "start_format": 1,
    "early_stopping": None,
}
"""Values of the fields that the other kind of point has: part of the content, and so of keys."""


AnyPoint = FixedPoint | LearnedPoint


def point_from_dict(content: Mapping[str, Any]) -> AnyPoint:
    """The inverse of :meth:`Point.to_dict`, also after a way through JSON."""
    values = {**content, "metrics": tuple(content["metrics"])}
    if values["start"] is None:
        own = {name: value for name, value in values.items() if name not in _LEARNED_DEFAULTS}
        own["grids"] = tuple(Grid(**grid) for grid in values["grids"])
        own["gits"] = tuple(values["gits"])
        return FixedPoint(**own)
    own = {name: value for name, value in values.items() if name not in _FIXED_DEFAULTS}
    method = plugins.load("methods", own.pop("method"))(**own.pop("settings"))
    run = {field.name: own.pop(field.name) for field in dataclasses.fields(LearnedRun) if field.name != "method"}
    start = SolverChoice(**{**own.pop("start"), "grid": Grid(**values["start"]["grid"])})
    return LearnedPoint(run=LearnedRun(method=method, **run), start=start, **own)
