"""Sections for solvers: fixed families and their grids, learned families and their methods, baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator import plugins
from orchestrator.config.base import (
    NFE,
    Exponent,
    NotEmpty,
    ObjectiveChoice,
    PluginConfig,
    Positive,
    Several,
    Strict,
    as_list,
    as_plugin,
)
from orchestrator.errors import ConfigError
from orchestrator.models.base import Precision
from orchestrator.objectives.base import Objective
from solvers.distil.methods.base import Method
from solvers.families import Family, LearnableFamily
from solvers.grids import KINDS, Grid


class GITSConfig(Strict):
    """A grid chosen by GITS, by dynamic programming on training trajectories (``solvers.gits``)."""

    kind: Literal["gits"]
    gamma: float = Field(1.0, gt=0, le=10)
    loss: Literal["error", "deviation"] = "error"
    trajectories: int = Field(64, ge=1, strict=True)
    knots: int = Field(61, ge=2, le=1000, strict=True)

    @property
    def label(self) -> str:
        return "GITS" if (self.gamma, self.loss) == (1.0, "error") else f"GITS gamma={self.gamma:g} {self.loss}"


def _as_grid(value: Any) -> Any:
    """Convert ``edm`` or ``{kind: edm, rho: 5}`` to a :class:`Grid`, whose constructor validates the options."""
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
        if (problem := plugins.type_problem(Grid, key, content[key])) is not None:
            raise ValueError(f"time grid {kind!r}: {problem}")
    try:
        return Grid(**content)
    except TypeError as error:
        raise ValueError(f"{content} is not a time grid: {error}") from error


AnyGrid = Annotated[Grid | GITSConfig, BeforeValidator(_as_grid)]


class SolverConfig(Strict):
    """One fixed family of the sweep. A bare name means its defaults.

    ``nfe`` restricts it to some of the sweep's NFEs: several families need a multiple of their evaluations per step.
    ``grid`` is its grid before any search: a kind (uniform, log_snr, polynomial, edm, shifted, ays, gits) or a mapping
    with options. With ``search: false`` no other grid is tried.
    """

    family: str
    options: dict[str, Any] = Field(default_factory=dict)
    grid: AnyGrid = Grid()
    search: bool = Field(True, strict=True)
    nfe: Annotated[tuple[NFE, ...] | None, BeforeValidator(lambda v: None if v is None else as_list(v))] = None

    @property
    def label(self) -> str:
        """The solver's name in tables: its family, and its grid unless that is uniform."""
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
    """Grid search of every fixed family: all warped grids t = (1-(1-r)^p)^q with p and q from these lists.

    ``also`` lists further grids, by kind or with options.
    """

    p: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    q: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    also: tuple[AnyGrid, ...] = (Grid("log_snr"), Grid("polynomial"), Grid("edm"))
    search: Literal["race", "full"] = "race"
    """'full' scores every grid on ``pairs`` validation pairs, and the best three on all of them. 'race' scores all
    grids on a few pairs and goes on with those that are not clearly behind: almost always the same grid for a twentieth
    of the evaluations of 'full'. Its winner is scored on all validation pairs, and so are the next two if too close."""
    pairs: int = Field(256, ge=1, strict=True)
    """Number of validation pairs on which a grid is scored, in a race at most."""

    def candidates(self) -> list[Grid | GITSConfig]:
        """The uniform grid, all warped grids, and those of ``also``, without duplicates."""
        warped = [Grid("warped", p, q) if (p, q) != (1, 1) else Grid() for p in self.p for q in self.q]
        return list(dict.fromkeys([Grid(), *warped, *self.also]))


LEAST_SQUARES = "least_squares"
"""Name of the closed-form start; not a solver family."""

METHOD_KEYS = ("learning_rate", "decay", "jacobian")
"""Keys of a learned family that are options of its method, beside ``method.options``."""

SET_OUTSIDE_OPTIONS = dict.fromkeys(("iterations", "batch_size", *METHOD_KEYS), "the learned family's own key") | {
    "seed": "the configuration's `seeds`",
    "training_pairs": "`pairs.train`",
}
"""Fields of a method that ``method.options`` may not set, and what sets them."""


class LearnedConfig(Strict):
    """One learnable family of the sweep. Every list is an axis of the search within a cell (NFE, guidance).

    ``start`` names a fixed family, on its uniform grid, or is ``best``: family and grid of the best fixed solver on
    validation pairs, among those that this family can start from, at the same NFE and guidance and at the value of
    ``fixed_sigma0`` nearest in ratio. BNS can also start from ``least_squares``: theta in closed form, fitted row by
    row to the training pairs' trajectories on the uniform grid.

    ``method`` is 'adam' (Algorithm 2 of the BNS paper; by default 1500 iterations of 40 pairs), 'levenberg_marquardt'
    (by default at most 40 iterations of a growing number of pairs, until validation no longer improves), which needs no
    backward pass, or another plugin with its options. With ``batch_size``, every iteration takes that many pairs, and a
    run takes all its iterations, unless ``method.options`` says otherwise.
    """

    family: str
    options: dict[str, Any] = Field(default_factory=dict)
    objective: ObjectiveChoice = PluginConfig(name="psnr")
    """The loss to minimise; a bare name means its defaults. Iterates are chosen by validation PSNR in any case."""
    start: Annotated[tuple[str, ...], NotEmpty, Several] = ("best",)
    sigma0: Annotated[tuple[Positive, ...], NotEmpty, Several] = (1.0,)
    method: Annotated[PluginConfig, BeforeValidator(as_plugin)] = PluginConfig(name="adam")
    iterations: int | None = Field(None, ge=1, strict=True)
    batch_size: int | None = Field(None, ge=1, strict=True)
    validate_every: int | None = Field(None, ge=1, strict=True)
    data_parallel: bool = Field(False, strict=True)
    """Split every batch over all hosts, in blocks of 64 pairs: for models that are slow on a single host."""
    learning_rate: Annotated[tuple[Positive, ...], NotEmpty, Several] = (5e-3,)
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    jacobian: Literal["auto", "forward", "central", "jvp"] = "auto"
    """How the Jacobian with respect to theta is computed. 'auto' uses forward differences, or central ones if
    ``resources.precision`` is a half precision: these cost about twice as much and tolerate more rounding."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> LearnedConfig:
        method = self._method_class()
        for key in self.method.options:
            if key in SET_OUTSIDE_OPTIONS:
                raise ValueError(f"method.options: {key!r} is set by {SET_OUTSIDE_OPTIONS[key]}; remove it here")
        options = {field.name for field in dataclasses.fields(method)}
        settable = sorted(options - set(SET_OUTSIDE_OPTIONS))
        for key in self.method.options:
            if key not in settable:
                raise ValueError(
                    f"distillation method {self.method.name!r} has no option {key!r}"
                    f"{plugins.did_you_mean(key, settable)}; its options are: {', '.join(settable) or 'none'}"
                )
        for key in METHOD_KEYS:
            if key not in options and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key!r} has no meaning for method {self.method.name!r}; leave it out")
        if method.psnr_only and self.objective.name != "psnr":
            raise ValueError(
                f"method {self.method.name!r} minimises the PSNR loss, not {self.objective.name!r}; use method 'adam'"
            )
        return self

    def _method_class(self) -> type[Method]:
        try:
            method: type[Method] = plugins.load("methods", self.method.name)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return method

    @property
    def has_backward(self) -> bool:
        """Whether its method takes gradients by a backward pass."""
        return self._method_class().has_backward

    @property
    def validation_interval(self) -> int:
        """Iterations between validations: as configured, or else the method's default."""
        return self.validate_every or self._method_class().default_length.validate_every

    def methods(
        self, seed: int, training_pairs: int, precision: Precision, *, nfe: int, dimensions: int
    ) -> list[Method]:
        """The method at every point of its own axes, such as the learning rate.

        Args:
            seed: Seed of the batch order.
            training_pairs: Number of pairs to draw from.
            precision: Precision of the network during distillation.
            nfe, dimensions: Evaluations per sample, and its dimensions, on which defaults depend.
        """
        method = self._method_class()
        fields = {field.name for field in dataclasses.fields(method)}
        options = {key: getattr(self, key) for key in METHOD_KEYS if key in fields} | self.method.options
        common = {
            "iterations": self.iterations or method.default_length.iterations,
            "seed": seed,
            "training_pairs": training_pairs,
        }
        if self.batch_size is not None:
            common["batch_size"] = self.batch_size
        else:
            numbers = self.freedom(nfe) or nfe * (nfe + 5) // 2 + 1
            common |= method.defaults(numbers, dimensions, nfe, training_pairs)
        variants = method.variants(options, half_precision=precision != "float32")
        return [plugins.build("methods", self.method.name, {**common, **variant}) for variant in variants]

    def freedom(self, nfe: int) -> int | None:
        """The family's degrees of freedom; None if they are not known, or it has no solver of so many evaluations."""
        try:
            return self.build().freedom(nfe)
        except ValueError:  # reported with the solver that it starts from
            return None

    def build(self) -> LearnableFamily:
        built = plugins.build("families", self.family, self.options)
        if not built.learnable:
            raise ConfigError(
                f"family {self.family!r} has nothing to learn; list it under 'fixed', not under 'learned'"
            )
        if built.guidance_range is not None:
            raise ConfigError(
                f"family {self.family!r} learns on several guidance scales at once, but a sweep has one at a time; use "
                f"`bespoke distil` with a range of guidance scales, or learn 'bns' here"
            )
        return built

    def build_objective(self) -> Objective:
        return plugins.build("objectives", self.objective.name, self.objective.options)

    @property
    def label(self) -> str:
        """The solver's name in tables: its family, and its method or objective unless these are the defaults."""
        family = self.build().label
        parts = [] if self.objective.name == "psnr" else [self.build_objective().label]
        if (method := self._method_class().label) is not None:
            parts.insert(0, method)
        return f"{family} ({', '.join(parts)})" if parts else family


class BaselineConfig(Strict):
    """A fixed solver evaluated beside the theta, at each of their NFEs that it can run at.

    A bare name means its defaults. With ``sigma0`` it is the preconditioned solver that a distillation starts from.
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
            ConfigError: The grid must first be fitted to training pairs.
        """
        if not isinstance(self.grid, Grid):
            raise ConfigError(
                f"baseline {self.family!r} cannot step on grid 'gits', which is fitted in a sweep; choose another kind"
            )
        return self.grid

    @property
    def label(self) -> str:
        label = SolverConfig(family=self.family, options=self.options, grid=self.grid).label
        return label if self.sigma0 == 1 else f"{label}, σ0={self.sigma0:g}"
