"""The search space: an experiment's pair specs and its points. Pure functions of configuration and model facts.

A *point* is one trial. A *cell* is a (family, NFE, guidance scale, seed): trials are only ever compared within one,
since PSNR rises with NFE and a search across cells would just pick the largest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from orchestrator import plugins
from orchestrator.config import ExperimentConfig
from orchestrator.host import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.storage import canonical_json
from solvers.distil.adam import AdamSettings
from solvers.grids import Grid

Split = Literal["train", "validation", "test"]

RESULT_FORMAT = 1
"""Raised whenever the same point would give another result: what was computed before is then computed again."""


class PairKey(NamedTuple):
    """Which of an experiment's pair sets: training sets differ by seed, the others are shared by all seeds."""

    split: Split
    guidance_scale: float
    seed: int


def pair_specs(config: ExperimentConfig, facts: ModelFacts) -> dict[PairKey, PairSpec]:
    """Every pair set of the experiment; noise of different sets never overlaps."""
    specs: dict[PairKey, PairSpec] = {}
    pairs = config.pairs
    counts: dict[Split, int] = {"train": pairs.train, "validation": pairs.validation, "test": pairs.test}
    for scale in config.guidance_scale:
        for split, count in counts.items():
            if split == "train" and not config.learned:
                continue
            for seed in config.seeds if split == "train" else (0,):
                stream = {"validation": 0, "test": 1, "train": 2 + seed}[split]
                specs[PairKey(split, scale, seed)] = PairSpec(
                    model_digest=facts.digest,
                    conditioning=config.conditioning.model_dump(),
                    guidance_scale=scale,
                    shape=facts.shape,
                    seed=pairs.seed * 1002 + stream,
                    count=count,
                    batch_size=pairs.batch_size,
                    shard_size=pairs.shard_size,
                    rtol=pairs.rtol,
                    atol=pairs.atol,
                    device_class=facts.device_class,
                )
    return specs


@dataclass(frozen=True, kw_only=True)
class SolverChoice:
    """A fixed solver, fully determined: what a distillation may start from."""

    family: str
    options: dict[str, Any]
    label: str
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial, fully determined: equal points have equal results, whatever experiment they belong to.

    Attributes:
        family, options, label: The family, and its name in tables.
        nfe, guidance_scale, sigma0, seed: Where in the sweep.
        validation, test: Digests of the pair sets that choose and that report.
        metrics: Metrics on the test pairs.
        grids: Candidate grids of a fixed family; the best on ``search_pairs`` validation pairs is taken. A single
            candidate is the common grid.
        search_pairs: See ``grids``.
        start: Where a learned family starts.
        train: Digest of a learned family's training pairs.
        settings: Adam's settings of a learned family.
        validate_every: Iterations between validations of a learned family.
        early_stopping: Whether the search may end it early; what it then has is no result of the full run.
        format: Version of how results are computed.
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
    search_pairs: int = 0
    start: SolverChoice | None = None
    train: str | None = None
    settings: AdamSettings | None = None
    validate_every: int = 0
    early_stopping: bool = False
    format: int = RESULT_FORMAT

    @property
    def kind(self) -> Literal["common grid", "best grid", "learned"]:
        if self.start is not None:
            return "learned"
        return "common grid" if len(self.grids) == 1 else "best grid"

    @property
    def key(self) -> str:
        """Name of the point's folder: a digest of everything its result depends on."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self)).encode()).hexdigest()[:16]

    @property
    def cell(self) -> str:
        """Trials of one cell may be compared with each other."""
        return f"{self.label}/{self.kind}/nfe{self.nfe}/guidance{self.guidance_scale:g}/seed{self.seed}"

    @property
    def name(self) -> str:
        """For people: run names in MLflow."""
        parts = [self.label, f"nfe{self.nfe}"]
        if self.guidance_scale != 1:
            parts.append(f"g{self.guidance_scale:g}")
        if self.sigma0 != 1:
            parts.append(f"sigma0={self.sigma0:g}")
        if self.settings is not None and self.start is not None:
            parts += [f"lr{self.settings.learning_rate:g}", f"from {self.start.label}", f"seed{self.seed}"]
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
        if values["start"] is not None:
            values["start"] = SolverChoice(**{**values["start"], "grid": Grid(**values["start"]["grid"])})
        if values["settings"] is not None:
            values["settings"] = AdamSettings(**values["settings"])
        return cls(**values)


def fixed_points(config: ExperimentConfig, specs: Mapping[PairKey, PairSpec]) -> list[Point]:
    """Every fixed family at every NFE, guidance scale and sigma0, on the common grid and on the best one."""
    points = []
    for solver in config.fixed:
        label = solver.build().label
        for scale, nfe, sigma0 in itertools.product(
            config.guidance_scale, solver.nfes(config.nfe), config.fixed_sigma0
        ):
            common = Point(
                family=solver.family,
                options=solver.options,
                label=label,
                nfe=nfe,
                guidance_scale=scale,
                sigma0=sigma0,
                seed=0,
                validation=specs[PairKey("validation", scale, 0)].digest,
                test=specs[PairKey("test", scale, 0)].digest,
                metrics=config.metrics,
                grids=(Grid(),),
            )
            points.append(common)
            if config.grid_search is not None:
                searched = min(config.grid_search.pairs, config.pairs.validation)
                points.append(dataclasses.replace(common, grids=tuple(config.grids()), search_pairs=searched))
    return points


def learned_points(
    config: ExperimentConfig,
    specs: Mapping[PairKey, PairSpec],
    best: Mapping[tuple[int, float, float], SolverChoice],
) -> list[Point]:
    """Every learned family at every point of its axes that has a solver to start from.

    Args:
        config: The experiment.
        specs: From :func:`pair_specs`.
        best: The best fixed solver on validation pairs, by (nfe, guidance scale, sigma0): what 'start: best' means.
    """
    points = []
    for learned in config.learned:
        label = learned.build().label
        axes = (config.guidance_scale, config.nfe, config.seeds, learned.sigma0, learned.start, learned.learning_rate)
        for scale, nfe, seed, sigma0, start, rate in itertools.product(*axes):
            choice = _start(start, best, nfe, scale, sigma0)
            if choice is None:
                continue
            settings = AdamSettings(
                learning_rate=rate,
                iterations=learned.iterations,
                batch_size=learned.batch_size,
                decay=learned.decay,
                seed=seed,
                training_pairs=config.pairs.train,
            )
            points.append(
                Point(
                    family=learned.family,
                    options=learned.options,
                    label=label,
                    nfe=nfe,
                    guidance_scale=scale,
                    sigma0=sigma0,
                    seed=seed,
                    validation=specs[PairKey("validation", scale, 0)].digest,
                    test=specs[PairKey("test", scale, 0)].digest,
                    metrics=config.metrics,
                    start=choice,
                    train=specs[PairKey("train", scale, seed)].digest,
                    settings=settings,
                    validate_every=learned.validate_every,
                    early_stopping=config.search.scheduler == "asha",
                )
            )
    return points


def _start(
    name: str, best: Mapping[tuple[int, float, float], SolverChoice], nfe: int, scale: float, sigma0: float
) -> SolverChoice | None:
    """The solver to start from; None where 'best' is asked for and no fixed solver finished."""
    if name == "best":
        swept = [key for key in best if key[:2] == (nfe, scale)]
        if not swept:
            return None
        return best[min(swept, key=lambda key: abs(math.log(key[2] / sigma0)))]
    # A named start is the family with its default options on the uniform grid, as in the papers.
    return SolverChoice(family=name, options={}, label=plugins.build("families", name).label, grid=Grid())
