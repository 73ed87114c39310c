"""The experiment configuration: everything that a run depends on, checked completely before any work starts.

The models are strict and frozen. The error for an unknown key suggests the nearest valid one. Pair specs are derived
from a configuration in ``pair_plan``, and sweep points in ``sweeps.space``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from orchestrator import plugins
from orchestrator.config.base import NFE, Model, NotEmpty, PluginConfig, Positive, Several, Source, Strict, in_section
from orchestrator.config.sections import EvaluationConfig, PairsConfig, Resources, SearchConfig
from orchestrator.config.solvers import LEAST_SQUARES, GITSConfig, GridSearch, LearnedConfig, SolverConfig
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import PairMetric
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.base import ModelAdapter
from solvers.families import Family
from solvers.families.bns import BNS
from solvers.grids import Grid
from solvers.schedulers import CondOT


class ExperimentConfig(Strict):
    """One experiment: a model, its pairs, the solvers to compare, and where the results are stored."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: Model
    conditioning: Source = PluginConfig(name="labels")
    guidance_scale: Annotated[tuple[float, ...], Several] = (1.0,)
    pairs: PairsConfig = PairsConfig()
    nfe: Annotated[tuple[NFE, ...], Several]
    fixed: tuple[SolverConfig, ...] = ()
    fixed_sigma0: Annotated[tuple[Positive, ...], NotEmpty, Several] = (1.0,)
    grid_search: GridSearch | None = GridSearch()
    learned: tuple[LearnedConfig, ...] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1000, strict=True)], ...], Several] = (0,)
    metrics: tuple[str, ...] = ("psnr", "snr", "rmse")
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: Resources = Resources()
    storage: str = Field("bespoke-data", min_length=1)
    tracking_uri: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _bare_families(cls, values: Any) -> Any:
        """Expand ``fixed: [euler, heun]`` to ``fixed: [{family: euler}, {family: heun}]``."""
        if not isinstance(values, dict):
            return values
        expanded = dict(values)
        for key in ("fixed", "learned"):
            if isinstance(expanded.get(key), list):
                expanded[key] = [{"family": item} if isinstance(item, str) else item for item in expanded[key]]
        return expanded

    def check(self) -> None:
        """Check everything that can be checked without loading a model.

        Raises:
            ConfigError: The experiment cannot run; names the key, the value and the remedy.
        """
        for metric in self.metrics:
            with in_section("metrics"):
                built = plugins.build("metrics", metric)
            if not isinstance(built, PairMetric):
                raise ConfigError(
                    f"metrics lists {metric!r}, which cannot be measured during a sweep: only metrics with one value "
                    f"per pair, such as psnr and snr, can; list it under evaluation.metrics"
                )
        if "psnr" not in self.metrics:
            raise ConfigError("metrics must include 'psnr': iterates and grids are chosen by it")
        with in_section("model"):
            adapter = plugins.load("models", self.model.name)
            adapter.check(self.model.options)
            model: ModelAdapter | None = adapter.without_network(self.model.options)
        if model is not None:
            self._check_samples(model)
        with in_section("conditioning"):
            dataset = self.conditioning.build("datasets")
            dataset.check()
            adapter.check_conditioning(self.model.options, dataset)
        with in_section("guidance_scale"):
            for scale in self.guidance_scale:
                adapter.check_guidance(self.model.options, scale)
        if not self.fixed and not self.learned:
            raise ConfigError("the sweep is empty: list families under 'fixed', 'learned', or both")
        for name, values in self._lists().items():
            # Formatted as in the names of files and runs, where 1 and 1.0000001 would coincide.
            formatted = {f"{value:g}" if isinstance(value, float) else value for value in values}
            if not values or len(formatted) != len(values):
                raise ConfigError(f"{name} must list at least one value and no value twice; got {list(values)}")
        for number, solver in enumerate(self.fixed):
            with in_section(f"fixed.{number}"):
                self._check_nfe(solver)
        _refuse_twice("fixed", [solver.label for solver in self.fixed])
        if not self.learned and not any(solver.nfes(self.nfe) for solver in self.fixed):
            raise ConfigError(
                f"no fixed family runs at any nfe of {list(self.nfe)}: their own 'nfe' lists exclude all of them"
            )
        for number, learned in enumerate(self.learned):
            with in_section(f"learned.{number}"):
                self._check_learned(learned)
        _refuse_twice("learned", [learned.label for learned in self.learned])
        if self.resources.checkpoint and not any(learned.has_backward for learned in self.learned):
            raise ConfigError(
                "resources.checkpoint only affects gradients, and no learned family has a method with a backward pass, "
                "such as 'method: adam'; leave it out"
            )

    def _check_samples(self, model: ModelAdapter) -> None:
        """Refuse metrics and objectives that are not defined for the model's samples."""
        images = None if model.decodes else model.shape
        for metric in self.metrics:
            with in_section("metrics"):
                MetricSpec(metric).check_samples(model.shown_kind, model.shape, images, self.pairs.test)
        for number, learned in enumerate(self.learned):
            with in_section(f"learned.{number}"):
                learned.build_objective().check_shape(model.shape)

    def _lists(self) -> dict[str, tuple[Any, ...]]:
        """Lists whose entries appear in the names of runs and files, and so must be distinct."""
        return {
            "nfe": self.nfe,
            "guidance_scale": self.guidance_scale,
            "seeds": self.seeds,
            "fixed_sigma0": self.fixed_sigma0,
            "metrics": self.metrics,
        }

    def _check_nfe(self, solver: SolverConfig) -> None:
        family = solver.build()
        for nfe in solver.nfes(self.nfe):
            try:
                steps = family.steps(nfe)
            except ValueError as error:
                allowed = [n for n in solver.nfes(self.nfe) if _affords(family, n)]
                hint = f"give {solver.family} its own 'nfe: {allowed}'" if allowed else f"leave {solver.family} out"
                raise ConfigError(f"fixed family {solver.family!r} at nfe {nfe}: {error}, or {hint}") from error
            if isinstance(solver.grid, Grid) and solver.grid.kind == "given":
                try:
                    solver.grid.times(steps, CondOT())
                except ValueError as error:
                    raise ConfigError(f"grid of fixed family {solver.family!r} at nfe {nfe}: {error}") from error

    def _check_learned(self, learned: LearnedConfig) -> None:
        family = learned.build()
        for nfe in self.nfe:
            if learned.freedom(nfe) == 0:
                raise ConfigError(
                    f"learned family {learned.family!r} has nothing to learn at nfe {nfe}: all its solvers of so few "
                    f"evaluations are the same; leave nfe {nfe} out, or learn 'bns'"
                )
        if learned.jacobian == "jvp" and self.resources.precision != "float32":
            raise ConfigError(
                f"'jacobian: jvp' of {learned.family!r} needs float32, and resources.precision is "
                f"{self.resources.precision!r}; use 'forward' or 'central'"
            )
        adapter = plugins.load("models", self.model.name)
        methods = learned.methods(0, self.pairs.train, self.resources.precision, nfe=self.nfe[0], dimensions=1)
        if any(method.needs_gradients for method in methods) and not getattr(adapter, "differentiable", True):
            raise ConfigError(
                f"models of adapter {self.model.name!r} cannot be differentiated; distil {learned.family!r} with "
                f"'method: levenberg_marquardt' and its default 'jacobian: auto'"
            )
        try:
            learned.build_objective().check(family)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        allowed = "" if family.starts is None else f" (it can only start from {' or '.join(family.starts)})"
        example = (family.starts or ("midpoint",))[0]
        for start in learned.start:
            if start == "best":
                startable = [solver for solver in self.fixed if family.starts_from(solver.build())]
                if not startable:
                    raise ConfigError(
                        f"learned family {learned.family!r} starts from the best fixed solver{allowed}, but 'fixed' "
                        f"has none; list families there or name a start, e.g. 'start: {example}'"
                    )
                reachable = {n for solver in startable for n in solver.nfes(self.nfe)}
                missing = [n for n in self.nfe if n not in reachable]
                if missing:
                    raise ConfigError(
                        f"no fixed family that {learned.family!r} can start from runs at nfe {missing[0]}, so "
                        f"'start: best' has nothing to choose from{allowed}"
                    )
                continue
            if start == LEAST_SQUARES:
                if not isinstance(family, BNS):
                    raise ConfigError(
                        f"only 'bns' can start from {LEAST_SQUARES!r}: {learned.family!r} cannot represent every solver"
                    )
                if set(learned.sigma0) != {1.0}:
                    raise ConfigError(
                        f"start {LEAST_SQUARES!r} is fitted to the original path; leave sigma0 at 1, or start from "
                        f"'best'"
                    )
                continue
            if not family.starts_from(SolverConfig(family=start).build()):
                raise ConfigError(f"learned family {learned.family!r} cannot start from {start!r}{allowed}")
            for nfe in self.nfe:
                try:
                    SolverConfig(family=start).build().steps(nfe)
                except ValueError as error:
                    raise ConfigError(f"start {start!r} of {learned.family!r} at nfe {nfe}: {error}") from error

    def grids(self, solver: SolverConfig) -> list[Grid | GITSConfig]:
        """The grids among which a fixed solver's grid is chosen, its own first."""
        if self.grid_search is None or not solver.search:
            return [solver.grid]
        return list(dict.fromkeys([solver.grid, *self.grid_search.candidates()]))

    @property
    def needs_training_pairs(self) -> bool:
        """Whether a distillation or a grid is fitted to training pairs."""
        return bool(self.learned) or self.needs_trajectories

    @property
    def needs_trajectories(self) -> bool:
        """Whether a grid, an objective or a start needs the trajectories of the training pairs."""
        grids = [grid for solver in self.fixed for grid in self.grids(solver)]
        return any(isinstance(grid, GITSConfig) for grid in grids) or any(
            learned.build_objective().needs_trajectory or LEAST_SQUARES in learned.start for learned in self.learned
        )


def _affords(family: Family, nfe: int) -> bool:
    try:
        family.steps(nfe)
    except ValueError:
        return False
    return True


def _refuse_twice(key: str, labels: Sequence[str]) -> None:
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        remedy = "list the settings as axes instead, e.g. 'learning_rate: [1.0e-3, 5.0e-3]'"
        if key == "fixed":
            remedy = "leave one out, or give it another grid or other options"
        raise ConfigError(f"{key!r} lists {repeated!r} twice; their results would share one row; {remedy}")
