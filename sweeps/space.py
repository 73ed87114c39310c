"""The search space of an experiment: its points, from its configuration and the facts of its model. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey
from orchestrator.config.solvers import LEAST_SQUARES, GITSConfig
from orchestrator.errors import ConfigError
from orchestrator.hosts.runs import LearnedRun
from orchestrator.pairs import PairSpec
from orchestrator.progress import Note, note
from solvers.families import LearnableFamily
from solvers.grids import Grid
from solvers.schedulers.base import Scheduler
from sweeps.point import FixedPoint, LearnedPoint, SolverChoice


def fixed_points(config: ExperimentConfig, specs: Mapping[PairKey, PairSpec]) -> list[FixedPoint]:
    """Points of every fixed family at every NFE, guidance scale and sigma0, on the common grid and on the best one."""
    points = []
    for solver in config.fixed:
        for scale, nfe, sigma0 in itertools.product(
            config.guidance_scale, solver.nfes(config.nfe), config.fixed_sigma0
        ):
            common = FixedPoint(
                family=solver.family,
                options=solver.options,
                label=solver.label,
                nfe=nfe,
                guidance_scale=scale,
                sigma0=sigma0,
                seed=0,
                validation=specs[PairKey("validation", scale, 0)].name,
                test=specs[PairKey("test", scale, 0)].name,
                metrics=config.metrics,
            )
            train = PairKey("train", scale, config.seeds[0])
            points.append(_on_grids(common, [solver.grid], specs.get(train)))
            if config.grid_search is not None and solver.search:
                searched = min(config.grid_search.pairs, config.pairs.validation)
                best = _on_grids(common, config.grids(solver), specs.get(train))
                race = config.grid_search.search == "race"
                points.append(dataclasses.replace(best, search_pairs=searched, race=race))
    return points


def check_pairs(config: ExperimentConfig, shape: Sequence[int], announce: Note = note) -> None:
    """Check that each learned family's method can learn from so many pairs of samples of this shape.

    Args:
        config: The experiment.
        shape: Shape of a sample.
        announce: Receives a sentence for each family whose pairs are barely enough.

    Raises:
        ConfigError: It cannot; with the numbers.
    """
    doubts: dict[str, None] = {}  # in order, and each once
    for learned, nfe in itertools.product(config.learned, config.nfe):
        numbers = learned.build().freedom(nfe)
        for method in learned.methods(
            config.seeds[0], config.pairs.train, config.resources.precision, nfe=nfe, dimensions=math.prod(shape)
        ):
            try:
                if numbers is not None:
                    method.check_pairs(numbers, math.prod(shape))
            except ValueError as error:
                text = str(error).replace("training_pairs", "pairs.train")
                raise ConfigError(f"{learned.label} at nfe {nfe}: {text}") from error
            doubt = None if numbers is None else method.doubt_about_pairs(numbers, math.prod(shape))
            if doubt is not None:
                doubts[f"{learned.label} at nfe {nfe}: {doubt.replace('training_pairs', 'pairs.train')}"] = None
    for sentence in doubts:
        announce(sentence)


def _on_grids(point: FixedPoint, grids: Sequence[Grid | GITSConfig], train: PairSpec | None) -> FixedPoint:
    """The point with these candidate grids. It depends on the training pairs only if a grid is computed from them."""
    fixed = tuple(grid for grid in grids if isinstance(grid, Grid))
    gits = tuple(grid.model_dump(exclude={"kind"}) for grid in grids if isinstance(grid, GITSConfig))
    name = train.name if gits and train is not None else None
    return dataclasses.replace(point, grids=fixed, gits=gits, train=name)


def learned_points(
    config: ExperimentConfig,
    specs: Mapping[PairKey, PairSpec],
    best: Mapping[tuple[int, float, float], Sequence[SolverChoice]],
    scheduler: Scheduler,
    no_start: Callable[[str], None] = lambda distillation: None,
) -> list[LearnedPoint]:
    """Points of every learned family on all its axes, except those without a solver to start from.

    Args:
        config: The experiment.
        specs: Pair specs, see :func:`~orchestrator.config.pair_plan.pair_specs`.
        best: Fixed solvers by (nfe, guidance scale, sigma0), best on validation pairs first. 'start: best' means the
            first one that the family can start from.
        scheduler: Scheduler of the model's field.
        no_start: Called with each distillation that has no fixed solver to start from.
    """
    points = []
    for learned in config.learned:
        family, objective_content = learned.build(), learned.build_objective().content
        axes = (config.guidance_scale, config.nfe, config.seeds, learned.sigma0, learned.start)
        for scale, nfe, seed, sigma0, start in itertools.product(*axes):
            train = specs[PairKey("train", scale, seed)]
            choice = _start(start, family, best, nfe, scale, sigma0, scheduler)
            if choice is None:
                no_start(f"distillation of {learned.label} at nfe {nfe}, guidance {scale:g}")
                continue
            points += [
                LearnedPoint(
                    run=LearnedRun(
                        family=learned.family,
                        options=learned.options,
                        sigma0=sigma0,
                        train=train.name,
                        method=method,
                        objective=learned.objective.name,
                        objective_options=learned.objective.options,
                    ),
                    start=choice,
                    objective_content=objective_content,
                    label=learned.label,
                    nfe=nfe,
                    guidance_scale=scale,
                    seed=seed,
                    validation=specs[PairKey("validation", scale, 0)].name,
                    test=specs[PairKey("test", scale, 0)].name,
                    metrics=config.metrics,
                    precision=config.resources.precision,
                    data_parallel=learned.data_parallel,
                    validate_every=learned.validation_interval,
                    compile=config.resources.compile,
                    start_format=family.start_format,
                    early_stopping=config.search.model_dump() if config.search.scheduler == "asha" else None,
                )
                for method in learned.methods(
                    seed, train.count, config.resources.precision, nfe=nfe, dimensions=math.prod(train.shape)
                )
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
