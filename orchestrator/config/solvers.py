"""Sections for solvers: fixed families and their grids, learned families and their methods, baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from orchestrator import plugins
from orchestrator.config.base import Exponent, NotEmpty, PluginConfig, Positive, Several, Strict, as_list, as_plugin
from orchestrator.errors import ConfigError
from orchestrator.hosts.distillation import Settings
from orchestrator.models.base import Precision
from orchestrator.objectives.base import Objective
from solvers.distil.adam import AdamSettings
from solvers.distil.levenberg_marquardt import LMSettings
from solvers.distil.normal_equations import Jacobian
from solvers.families import Family, LearnableFamily
from solvers.grids import KINDS, Grid


class GITSConfig(Strict):
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


class SolverConfig(Strict):
    """One fixed family of the sweep; a bare name means its defaults.

    ``nfe`` restricts it to these of the sweep's NFEs: some families need a multiple of their evaluations per step.
    ``grid`` is where it steps before any search: a kind of grid (uniform, log_snr, polynomial, edm, shifted, ays, gits)
    or a mapping with its options. ``search: false`` keeps it to that grid.
    """

    family: str
    options: dict[str, Any] = Field(default_factory=dict)
    grid: AnyGrid = Grid()
    search: bool = True
    nfe: Annotated[tuple[int, ...] | None, BeforeValidator(lambda v: None if v is None else as_list(v))] = None

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


class GridSearch(Strict):
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
        return distinct([Grid(), *warped, *self.also])


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


class LearnedConfig(Strict):
    """One learnable family of the sweep. Every list is an axis of the search inside a cell (NFE, guidance).

    ``start`` is a fixed family by name, on its uniform grid, or ``best``: family and grid of the best fixed solver on
    validation pairs (of those that this family can start from), at the same NFE and guidance, and at the sigma0 among
    ``fixed_sigma0`` that is nearest in ratio. BNS can also start from ``least_squares``: theta in closed form, fitted
    row by row to the training pairs' trajectories on the uniform grid.

    ``method`` is 'adam' (Algorithm 2 of the BNS paper: 1500 iterations of 40 pairs unless told) or
    'levenberg_marquardt' (40 iterations of 64 pairs), which needs no backward pass.
    """

    family: str
    options: dict[str, Any] = Field(default_factory=dict)
    objective: Annotated[PluginConfig, BeforeValidator(as_plugin)] = PluginConfig(name="psnr")
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


class BaselineConfig(Strict):
    """A fixed solver evaluated beside the theta, at each of their NFEs that it can run at; a bare name is its defaults.

    With ``sigma0`` it is the preconditioned solver that a distillation starts from.
    """

    family: str
    options: dict[str, Any] = Field(default_factory=dict)
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


def distinct(grids: Iterable[Grid | GITSConfig]) -> list[Grid | GITSConfig]:
    found: list[Grid | GITSConfig] = []
    for grid in grids:
        if grid not in found:
            found.append(grid)
    return found
