"""The experiment configuration: everything a run depends on, checked whole before any work starts.

Models are strict and frozen; an unknown key is refused with the nearest valid one. What is derived from a
configuration (pair specs, the list of points) is made elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.hosts.distillation import Settings
from orchestrator.metrics.base import PairMetric
from orchestrator.models.base import Precision
from orchestrator.objectives.base import Objective
from solvers.distil.adam import AdamSettings
from solvers.distil.levenberg_marquardt import LMSettings
from solvers.distil.normal_equations import Jacobian
from solvers.families import Family, LearnableFamily
from solvers.families.bns import BNS
from solvers.grids import KINDS, Grid
from solvers.schedulers import CondOT


def _as_list(value: Any) -> Any:
    """A single value where a list is meant: ``sigma0: 1`` is ``sigma0: [1]``."""
    return value if isinstance(value, list | tuple) else [value]


Several = BeforeValidator(_as_list)
NotEmpty = Field(min_length=1)
Positive = Annotated[float, Field(gt=0)]
Exponent = Annotated[float, Field(gt=0, le=10)]


M = TypeVar("M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginConfig(_Strict):
    """A plugin by name with its options: ``{name: zoo, options: {weights: digits_fm_ot}}``."""

    name: str
    options: dict[str, Any] = {}


class PairsConfig(_Strict):
    """Ground-truth pairs: how many, how exactly, in which batches."""

    train: int = Field(520, ge=1, strict=True)
    validation: int = Field(1024, ge=1, strict=True)
    test: int = Field(1024, ge=1, strict=True)
    rtol: float = Field(1e-6, gt=0, lt=1)
    atol: float = Field(1e-6, gt=0, lt=1)
    batch_size: int = Field(64, ge=1, strict=True)
    shard_size: int = Field(256, ge=1, strict=True)
    seed: int = Field(0, ge=0, lt=2**31, strict=True)

    @model_validator(mode="after")
    def _whole_batches(self) -> PairsConfig:
        if self.shard_size % self.batch_size:
            raise ValueError(
                f"shard_size {self.shard_size} is no multiple of batch_size {self.batch_size}; a pair's batch must not "
                f"span shards, use {max(1, self.shard_size // self.batch_size) * self.batch_size}"
            )
        return self


class GITSConfig(_Strict):
    """The grid that GITS finds on training trajectories by dynamic programming (``solvers.gits``)."""

    kind: Literal["gits"]
    gamma: float = Field(1.0, gt=0, le=10)
    loss: Literal["error", "deviation"] = "error"
    trajectories: int = Field(64, ge=1, strict=True)
    knots: int = Field(61, ge=2, le=1000, strict=True)

    @property
    def label(self) -> str:
        return "GITS" if (self.gamma, self.loss) == (1.0, "error") else f"GITS gamma={self.gamma:g} {self.loss}"


def _as_grid(value: Any) -> Any:
    """``edm`` or ``{kind: edm, rho: 5}`` as a :class:`Grid`; what is wrong with it is told by the grid itself."""
    content = {"kind": value} if isinstance(value, str) else value
    if not isinstance(content, dict) or content.get("kind") == "gits":
        return content
    kinds = [*KINDS, "gits"]
    kind = content.get("kind", "uniform")
    if kind not in kinds:
        hint = plugins.did_you_mean(str(kind), kinds)
        raise ValueError(f"unknown time grid {kind!r}{hint}; choose one of {', '.join(kinds)}")
    known = [f.name for f in dataclasses.fields(Grid)]
    for key in content:
        if key not in known:
            raise ValueError(
                f"a time grid has no {key!r}{plugins.did_you_mean(key, known)}; it has: {', '.join(known)}"
            )
    try:
        return Grid(**content)
    except TypeError as error:
        raise ValueError(f"{content} is no time grid: {error}") from error


AnyGrid = Annotated[Grid | GITSConfig, BeforeValidator(_as_grid)]


class SolverConfig(_Strict):
    """One fixed family of the sweep; a bare name means its defaults.

    ``nfe`` restricts it to these of the sweep's NFEs: some families need a multiple of their evaluations per step.
    ``grid`` is where it steps before any search: a kind of grid (uniform, log_snr, polynomial, edm, shifted, ays, gits)
    or a mapping with its options. ``search: false`` keeps it to that grid.
    """

    family: str
    options: dict[str, Any] = {}
    grid: AnyGrid = Grid()
    search: bool = True
    nfe: Annotated[tuple[int, ...] | None, BeforeValidator(lambda v: None if v is None else _as_list(v))] = None

    @property
    def label(self) -> str:
        """The solver's name in tables: its family, and its grid where that is not the uniform one."""
        family = self.build().label
        return family if self.grid == Grid() else f"{family} ({self.grid.label})"

    def nfes(self, swept: Sequence[int]) -> list[int]:
        """The NFEs of the sweep that this family runs at."""
        return [nfe for nfe in swept if self.nfe is None or nfe in self.nfe]

    def build(self) -> Family:
        built = plugins.build("families", self.family, self.options)
        if built.learnable:
            raise ConfigError(f"family {self.family!r} is learned; list it under 'learned', not under 'fixed'")
        return built


class GridSearch(_Strict):
    """The search every fixed family is given: all warped grids t = (1-(1-r)^p)^q with p and q from these lists.

    ``also`` are further grids to try, by kind or with options.
    """

    p: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    q: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    also: tuple[AnyGrid, ...] = (Grid("log_snr"), Grid("polynomial"), Grid("edm"))
    pairs: int = Field(256, ge=1, strict=True)
    """Validation pairs a grid is scored on; the winner is scored again on all of them."""

    def candidates(self) -> list[Grid | GITSConfig]:
        """The uniform grid, every warped one, and the others, each once."""
        warped = [Grid("warped", p, q) if (p, q) != (1, 1) else Grid() for p in self.p for q in self.q]
        return _distinct([Grid(), *warped, *self.also])


Method = Literal["adam", "levenberg_marquardt"]


class MethodDefaults(NamedTuple):
    """What a method of distillation does where a configuration leaves it open."""

    iterations: int
    batch_size: int
    validate_every: int


METHODS: dict[Method, MethodDefaults] = {
    "adam": MethodDefaults(iterations=1500, batch_size=40, validate_every=100),
    "levenberg_marquardt": MethodDefaults(iterations=40, batch_size=64, validate_every=4),
}
LEAST_SQUARES = "least_squares"
"""The start that is fitted to trajectories and is no family."""

ADAM_ONLY = ("learning_rate", "decay")
LM_ONLY = ("jacobian",)


class LearnedConfig(_Strict):
    """One learnable family of the sweep. Every list is an axis of the search inside a cell (NFE, guidance).

    ``start`` is a fixed family by name, on its uniform grid, or ``best``: family and grid of the best fixed solver on
    validation pairs (of those that this family can start from), at the same NFE and guidance, and at the sigma0 among
    ``fixed_sigma0`` that is nearest in ratio. BNS can also start from ``least_squares``: theta in closed form, fitted
    row by row to the training pairs' trajectories on the uniform grid.

    ``method`` is 'adam' (Algorithm 2 of the BNS paper: 1500 iterations of 40 pairs unless told) or
    'levenberg_marquardt' (40 iterations of 64 pairs), which needs no backward pass.
    """

    family: str
    options: dict[str, Any] = {}
    objective: Annotated[PluginConfig, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = (
        PluginConfig(name="psnr")
    )
    """What is minimised; a bare name means its defaults. Iterates are chosen by validation PSNR in any case."""
    start: Annotated[tuple[str, ...], NotEmpty, Several] = ("best",)
    sigma0: Annotated[tuple[Positive, ...], NotEmpty, Several] = (1.0,)
    method: Method = "adam"
    iterations: int | None = Field(None, ge=1, strict=True)
    batch_size: int | None = Field(None, ge=1, strict=True)
    validate_every: int | None = Field(None, ge=1, strict=True)
    data_parallel: bool = False
    """Split every batch over all hosts, 64 pairs each: for models of which one host alone is slow."""
    learning_rate: Annotated[tuple[Positive, ...], NotEmpty, Several] = (5e-3,)
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    jacobian: Literal["auto", "forward", "central", "jvp"] = "auto"
    """How theta's Jacobian is taken: 'auto' takes forward differences, and central ones, which cost about twice as much
    and stand more rounding, where resources.precision is half."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> LearnedConfig:
        for method, names in (("levenberg_marquardt", ADAM_ONLY), ("adam", LM_ONLY)):
            strange = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if self.method == method and strange:
                raise ValueError(f"{strange[0]!r} has no meaning for method {method!r}; leave it out")
        if self.method == "levenberg_marquardt" and self.objective.name != "psnr":
            raise ValueError(
                f"method 'levenberg_marquardt' minimises the PSNR loss, not {self.objective.name!r}; use method 'adam'"
            )
        return self

    @property
    def length(self) -> MethodDefaults:
        """Iterations, batch size and validation interval: as told, else the method's own."""
        told = (self.iterations, self.batch_size, self.validate_every)
        return MethodDefaults(*(own if t is None else t for t, own in zip(told, METHODS[self.method], strict=True)))

    def settings(self, seed: int, training_pairs: int, precision: Precision) -> list[Settings]:
        """The method's settings at every point of its own axes."""
        common = {
            "iterations": self.length.iterations,
            "batch_size": self.length.batch_size,
            "seed": seed,
            "training_pairs": training_pairs,
        }
        if self.method == "levenberg_marquardt":
            differences: Jacobian = "forward" if precision == "float32" else "central"
            return [LMSettings(jacobian=differences if self.jacobian == "auto" else self.jacobian, **common)]
        return [AdamSettings(learning_rate=rate, decay=self.decay, **common) for rate in self.learning_rate]

    def build(self) -> LearnableFamily:
        built = plugins.build("families", self.family, self.options)
        if not built.learnable:
            raise ConfigError(
                f"family {self.family!r} has nothing to learn; list it under 'fixed', not under 'learned'"
            )
        return built

    def build_objective(self) -> Objective:
        return plugins.build("objectives", self.objective.name, self.objective.options)

    @property
    def label(self) -> str:
        """The solver's name in tables: its family, and how and for what it was trained where that is not the usual."""
        family = self.build().label
        if self.method == "levenberg_marquardt":
            return f"{family} (LM)"
        return family if self.objective.name == "psnr" else f"{family} ({self.build_objective().label})"


class SearchConfig(_Strict):
    """How Ray Tune spends the trials of a cell. 'asha' stops the worse ones early, and never compares across cells."""

    scheduler: Literal["fifo", "asha"] = "fifo"
    grace_validations: int = Field(3, ge=1, strict=True)
    reduction_factor: int = Field(3, ge=2, strict=True)


class Resources(_Strict):
    """What the sweep takes of the cluster. Fractions are bookkeeping; torch threads are set to match."""

    hosts: int = Field(2, ge=1, strict=True)
    host_cpus: float = Field(0.5, gt=0)
    host_gpus: float = Field(0, ge=0)
    host_threads: int = Field(1, ge=1, strict=True)
    trial_cpus: float = Field(0.125, gt=0)
    local_cpus: int | None = Field(None, ge=1, strict=True)
    device: str = Field("cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    host_memory_gb: float = Field(1.0, gt=0)
    """What a distillation step may hold on a host beside the model, in 10^9 bytes; batches shrink to fit."""
    precision: Precision = "float32"
    """What the network computes in while a solver is distilled: bfloat16 and float16 are torch's autocast, on any
    device. Losses, states and theta keep theirs; ground truth and scores are always the network's own."""
    checkpoint: bool = Field(False, strict=True)
    """Gradients keep the activations of one evaluation, and evaluate again: less memory, 1.5 to 2 times the time."""
    compile: bool = Field(False, strict=True)
    """Distil with the network compiled by torch.compile, which must succeed; it needs a C++ or CUDA compiler."""
    request_timeout: float | None = Field(None, gt=0)
    """Seconds after which a host that gives no answer is taken for hung and started again; none by default. The start
    itself may take as long as it takes."""
    merge: int = Field(8, ge=1, strict=True)
    """Most runs of one NFE that a host advances in shared model batches, where it measures that to be faster. What
    runs learn then depends on their company by rounding; with 1, a sweep repeats to the bit."""

    @model_validator(mode="after")
    def _device_matches(self) -> Resources:
        if self.device.startswith("cuda") and self.host_gpus == 0:
            raise ValueError(f"device {self.device!r} needs resources.host_gpus above 0, e.g. 1 or 0.5")
        if self.device == "cpu" and self.host_gpus > 0:
            raise ValueError(f"host_gpus is {self.host_gpus:g} but device is 'cpu'; set resources.device to cuda")
        return self


def _as_plugin(value: Any) -> Any:
    """A bare name is a plugin with its defaults."""
    return {"name": value} if isinstance(value, str) else value


class BaselineConfig(_Strict):
    """A fixed solver evaluated beside the theta, at each of their NFEs that it can run at; a bare name is its defaults.

    With ``sigma0`` it is the preconditioned solver that a distillation starts from.
    """

    family: str
    options: dict[str, Any] = {}
    grid: AnyGrid = Grid()
    sigma0: Positive = 1.0

    def build(self) -> Family:
        return SolverConfig(family=self.family, options=self.options).build()

    @property
    def fixed_grid(self) -> Grid:
        """The grid that it steps on.

        Raises:
            ConfigError: One that has to be found on training pairs first.
        """
        if not isinstance(self.grid, Grid):
            raise ConfigError(f"baseline {self.family!r} cannot step on grid 'gits', which is found in a sweep")
        return self.grid

    @property
    def label(self) -> str:
        label = SolverConfig(family=self.family, options=self.options, grid=self.grid).label
        return label if self.sigma0 == 1 else f"{label}, σ0={self.sigma0:g}"


class EvaluationConfig(_Strict):
    """What ``bespoke evaluate`` scores solvers by, and on what.

    Attributes:
        datasets: Sources of conditioning (and of real samples, prompts, voices) by the name they have in tables; none:
            the experiment's own conditioning.
        metrics: Metrics, with options where they have some; none: those of the sweep.
        samples: Samples of each solver on each dataset; None: as many as there are test pairs.
        baselines: Fixed solvers beside the theta.
        ground_truth: Whether ground truth is a row of its own.
        training_passes: Passes of one sample through the network that its training took (a backward counted as two):
            the share that a distillation cost is told where it is given.
        scorers: Actors that hold the networks of metrics.
        scorer_cpus, scorer_gpus, scorer_device: What each of them takes.
        batch_size: Samples that go through a metric's network at once.
        pictures: Samples that are shown of each solver.
    """

    datasets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")], PluginConfig] = {}
    metrics: tuple[Annotated[PluginConfig, BeforeValidator(_as_plugin)], ...] = ()
    samples: int | None = Field(None, ge=1, strict=True)
    baselines: tuple[
        Annotated[BaselineConfig, BeforeValidator(lambda v: {"family": v} if isinstance(v, str) else v)], ...
    ] = ()
    ground_truth: bool = Field(True, strict=True)
    training_passes: int | None = Field(None, ge=1, strict=True)
    scorers: int = Field(1, ge=1, strict=True)
    scorer_cpus: float = Field(0.5, gt=0)
    scorer_gpus: float = Field(0, ge=0)
    scorer_device: str = Field("cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    batch_size: int = Field(64, ge=1, strict=True)
    pictures: int = Field(8, ge=1, le=64, strict=True)

    @model_validator(mode="after")
    def _device_matches(self) -> EvaluationConfig:
        if self.scorer_device.startswith("cuda") and self.scorer_gpus == 0:
            raise ValueError(f"scorer_device {self.scorer_device!r} needs scorer_gpus above 0, e.g. 1 or 0.5")
        return self


class ExperimentConfig(_Strict):
    """One experiment: a model, its pairs, the solvers to compare, and where everything goes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: PluginConfig
    conditioning: PluginConfig = PluginConfig(name="labels")
    guidance_scale: Annotated[tuple[float, ...], Several] = (1.0,)
    pairs: PairsConfig = PairsConfig()
    nfe: Annotated[tuple[Annotated[int, Field(ge=1, le=1000, strict=True)], ...], Several]
    fixed: tuple[SolverConfig, ...] = ()
    fixed_sigma0: Annotated[tuple[Positive, ...], NotEmpty, Several] = (1.0,)
    grid_search: GridSearch | None = GridSearch()
    learned: tuple[LearnedConfig, ...] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1000, strict=True)], ...], Several] = (0,)
    metrics: tuple[str, ...] = ("psnr", "snr", "rmse")
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: Resources = Resources()
    storage: str = "bespoke-data"
    tracking_uri: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_families(cls, values: Any) -> Any:
        """``fixed: [euler, heun]`` is ``fixed: [{family: euler}, {family: heun}]``."""
        if not isinstance(values, dict):
            return values
        opened = dict(values)
        for key in ("fixed", "learned"):
            if isinstance(opened.get(key), list):
                opened[key] = [{"family": item} if isinstance(item, str) else item for item in opened[key]]
        return opened

    def check(self) -> None:
        """Everything that can be known to be impossible without loading a model.

        Raises:
            ConfigError: Naming the key, the value and the remedy.
        """
        for metric in self.metrics:
            if not isinstance(plugins.build("metrics", metric), PairMetric):
                raise ConfigError(
                    f"metrics lists {metric!r}, which is not measured while a sweep runs: psnr, snr and their like "
                    f"are; list it under evaluation.metrics"
                )
        if "psnr" not in self.metrics:
            raise ConfigError("metrics must include 'psnr': it is what iterates and grids are chosen by")
        adapter = plugins.load("models", self.model.name)
        adapter.check(self.model.options)
        dataset = plugins.build("datasets", self.conditioning.name, self.conditioning.options)
        adapter.check_conditioning(self.model.options, dataset)
        if not self.fixed and not self.learned:
            raise ConfigError("the sweep is empty: list families under 'fixed', 'learned', or both")
        for name, values in self._lists().items():
            # As names of files and runs show them: 1 and 1.0000001 would be one.
            shown = {f"{value:g}" if isinstance(value, float) else value for value in values}
            if not values or len(shown) != len(values):
                raise ConfigError(f"{name} must list different values, at least one; got {list(values)}")
        for solver in self.fixed:
            self._check_nfe(solver)
        _refuse_twice("fixed", [solver.label for solver in self.fixed])
        if not self.learned and not any(solver.nfes(self.nfe) for solver in self.fixed):
            raise ConfigError(
                f"no fixed family runs at any nfe of {list(self.nfe)}; their own 'nfe' lists leave all out"
            )
        for learned in self.learned:
            self._check_learned(learned)
        _refuse_twice("learned", [learned.label for learned in self.learned])
        if self.resources.checkpoint and not any(learned.method == "adam" for learned in self.learned):
            raise ConfigError(
                "resources.checkpoint is of use to gradients alone, and no learned family has 'method: adam'; leave it "
                "out"
            )

    def _lists(self) -> dict[str, tuple[Any, ...]]:
        """Lists whose entries name runs and files, and so must differ."""
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
            if isinstance(solver.grid, Grid) and solver.grid.kind == "given" and _affords(family, nfe):
                try:
                    solver.grid.times(family.steps(nfe), CondOT())
                except ValueError as error:
                    raise ConfigError(f"grid of fixed family {solver.family!r} at nfe {nfe}: {error}") from error
            try:
                family.steps(nfe)
            except ValueError as error:
                allowed = [n for n in solver.nfes(self.nfe) if _affords(family, n)]
                hint = f"give {solver.family} its own 'nfe: {allowed}'" if allowed else f"leave {solver.family} out"
                raise ConfigError(f"fixed family {solver.family!r} at nfe {nfe}: {error}, or {hint}") from error

    def _check_learned(self, learned: LearnedConfig) -> None:
        family = learned.build()
        if learned.jacobian == "jvp" and self.resources.precision != "float32":
            raise ConfigError(
                f"'jacobian: jvp' of {learned.family!r} needs float32, and resources.precision is "
                f"{self.resources.precision!r}; use 'forward' or 'central'"
            )
        adapter = plugins.load("models", self.model.name)
        gradients = learned.method == "adam" or learned.jacobian == "jvp"
        if gradients and not getattr(adapter, "differentiable", True):
            raise ConfigError(
                f"models of adapter {self.model.name!r} cannot be differentiated; distil {learned.family!r} with "
                f"'method: levenberg_marquardt' and its default 'jacobian: auto'"
            )
        try:
            learned.build_objective().check(family)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        takes = "" if family.starts is None else f" (it can start from {' or '.join(family.starts)} only)"
        example = (family.starts or ("midpoint",))[0]
        for start in learned.start:
            if start == "best":
                startable = [solver for solver in self.fixed if family.starts_from(solver.build())]
                if not startable:
                    raise ConfigError(
                        f"learned family {learned.family!r} starts from the best fixed solver{takes}, but 'fixed' has "
                        f"none; list families there or name a start, e.g. 'start: {example}'"
                    )
                reachable = {n for solver in startable for n in solver.nfes(self.nfe)}
                missing = [n for n in self.nfe if n not in reachable]
                if missing:
                    raise ConfigError(
                        f"no fixed family that {learned.family!r} can start from runs at nfe {missing[0]}, so "
                        f"'start: best' has nothing there{takes}"
                    )
                continue
            if start == LEAST_SQUARES:
                if not isinstance(family, BNS):
                    raise ConfigError(
                        f"only 'bns' can start from {LEAST_SQUARES!r}: {learned.family!r} cannot equal every solver"
                    )
                if set(learned.sigma0) != {1.0}:
                    raise ConfigError(
                        f"start {LEAST_SQUARES!r} is fitted on the path itself; leave sigma0 at 1, or start from 'best'"
                    )
                continue
            if not family.starts_from(SolverConfig(family=start).build()):
                raise ConfigError(f"learned family {learned.family!r} cannot start from {start!r}{takes}")
            for nfe in self.nfe:
                try:
                    SolverConfig(family=start).build().steps(nfe)
                except ValueError as error:
                    raise ConfigError(f"start {start!r} of {learned.family!r} at nfe {nfe}: {error}") from error

    def grids(self, solver: SolverConfig) -> list[Grid | GITSConfig]:
        """The grids that a fixed solver is searched over; its own first."""
        if self.grid_search is None or not solver.search:
            return [solver.grid]
        return _distinct([solver.grid, *self.grid_search.candidates()])

    @property
    def needs_training_pairs(self) -> bool:
        """Whether anything learns from training pairs: a distillation, or a grid."""
        return bool(self.learned) or self.needs_trajectories

    @property
    def needs_trajectories(self) -> bool:
        """Whether anything needs the training pairs' trajectories."""
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


def _distinct(grids: Iterable[Grid | GITSConfig]) -> list[Grid | GITSConfig]:
    found: list[Grid | GITSConfig] = []
    for grid in grids:
        if grid not in found:
            found.append(grid)
    return found


def _refuse_twice(key: str, labels: Sequence[str]) -> None:
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        remedy = "list the settings as axes instead, e.g. 'learning_rate: [1.0e-3, 5.0e-3]'"
        if key == "fixed":
            remedy = "leave one out, or give it another grid or other options"
        raise ConfigError(f"{key!r} lists {twice!r} twice, and their results would be one row; {remedy}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read and check an experiment.

    Args:
        path: A YAML file.
        overrides: ``key=value`` with dotted keys, e.g. ``pairs.train=64`` or ``nfe=[4,8]``; values are YAML.

    Raises:
        ConfigError: Naming the key, the value and the remedy.
    """
    config = parse_config(read_yaml(path, overrides), str(path))
    config.check()
    return config


def parse_config(content: dict[str, Any], origin: str) -> ExperimentConfig:
    """Validate the shape of a configuration (see :meth:`ExperimentConfig.check` for its meaning)."""
    return validated(ExperimentConfig, content, origin)


def validated(model: type[M], content: dict[str, Any], origin: str) -> M:
    """``content`` as ``model``, every problem told in one :class:`ConfigError`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        wrong = [problem["loc"] for problem in found]
        # A list with a refused item is then also said to be too short: one problem, one line.
        told = [p for p in found if not any(len(w) > len(p["loc"]) and w[: len(p["loc"])] == p["loc"] for w in wrong)]
        problems = "\n  ".join(_explain(problem, model) for problem in told)
        raise ConfigError(f"{origin} is refused:\n  {problems}") from error


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with ``key=value`` overrides applied.

    A file may hold ``variants``, named mappings of overrides; ``variant=NAME`` applies one, before the other overrides.

    Raises:
        ConfigError: No such file, not YAML, not a mapping, an override that is no ``key=value``, or an unknown variant.
    """
    source = Path(path)
    if not source.is_file():
        raise ConfigError(f"no configuration at {source}; the ones that come along are in sweeps/configs")
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must be a mapping of keys to values, got {type(content).__name__}")
    variants = content.pop("variants", {})
    names = [override.partition("=")[2] for override in overrides if override.startswith("variant=")]
    for name in names:
        if name not in variants:
            listed = ", ".join(variants) or "none"
            raise ConfigError(
                f"{source} has no variant {name!r}{plugins.did_you_mean(name, variants)}; it has: {listed}"
            )
        for key, value in variants[name].items():
            _set(content, key, value, f"{key} of variant {name}")
    for override in overrides:
        if not override.startswith("variant="):
            _apply(content, override)
    return content


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a mapping; values are YAML.

    Raises:
        ConfigError: One that is no ``key=value``.
    """
    content: dict[str, Any] = {}
    for option in options:
        _apply(content, option)
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value, e.g. pairs.train=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from error
    _set(content, key, value, override)


def _set(content: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set a dotted key; ``override`` is what errors call it."""
    *parents, last = key.split(".")
    target: Any = content
    for part in parents:
        target = _step(target, part, override)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is no mapping")


def _step(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if isinstance(target, dict):
        if not isinstance(target.get(part), dict | list):
            target[part] = {}
        return target[part]
    raise ConfigError(f"override {override!r}: {part!r} lies inside a plain value")


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(target):
        raise ConfigError(f"override {override!r}: {part!r} is no index of a list of {len(target)}")
    return int(part)


def _explain(problem: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's problems."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        name = str(problem["loc"][-1])
        return f"{where}: unknown key{plugins.did_you_mean(name, known)}; known here: {', '.join(sorted(known))}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where or 'configuration'}: {message} (got {problem['input']!r})" if where else message


def _fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """Field names of the model that a location of pydantic's error leads to."""
    current: type[BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        found = _model_inside(field.annotation)
        if found is not None:
            current = found
    return list(current.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_inside(argument)
        if found is not None:
            return found
    return None


def resolve_tracking_uri(uri: str | None, storage: str) -> str:
    """Where MLflow is, independent of the working directory: trials run in others.

    Args:
        uri: What the user gave, or None for a SQLite store beside the data.
        storage: Storage root.

    Raises:
        ConfigError: None was given, and the storage is remote: a SQLite store cannot be there, nor be shared.
    """
    if uri is not None:
        relative = uri.removeprefix("sqlite:///")
        if uri.startswith("sqlite:///") and not relative.startswith("/"):
            return f"sqlite:///{Path(relative).absolute()}"
        return uri if "://" in uri or ":" in uri else str(Path(uri).absolute())
    root = unquote(storage.removeprefix("file://")) if storage.startswith("file://") else storage
    if "://" in root:
        raise ConfigError(
            f"storage {storage!r} is remote, and MLflow's SQLite store cannot be kept there; give --tracking-uri, e.g. "
            f"http://head:5000 of an `mlflow server`"
        )
    return f"sqlite:///{Path(root).expanduser().absolute() / 'mlflow.db'}"


def cpu_budget(resources: Resources) -> int:
    """CPUs that a local Ray gets: what is configured, else every core."""
    return resources.local_cpus or os.cpu_count() or 1
