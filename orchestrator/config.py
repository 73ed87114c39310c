"""The experiment configuration: everything a run depends on, checked whole before any work starts.

Models are strict and frozen; an unknown key is refused with the nearest valid one. What is derived from a
configuration (pair specs, the list of points) is made elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.storage import canonical_json
from solvers.families import Family, LearnableFamily
from solvers.grids import Grid


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


class SolverConfig(_Strict):
    """One fixed family of the sweep; a bare name means its defaults.

    ``nfe`` restricts it to these of the sweep's NFEs: some families need a multiple of their evaluations per step.
    """

    family: str
    options: dict[str, Any] = {}
    nfe: Annotated[tuple[int, ...] | None, BeforeValidator(lambda v: None if v is None else _as_list(v))] = None

    def nfes(self, swept: Sequence[int]) -> list[int]:
        """The NFEs of the sweep that this family runs at."""
        return [nfe for nfe in swept if self.nfe is None or nfe in self.nfe]

    def build(self) -> Family:
        built = plugins.build("families", self.family, self.options)
        if built.learnable:
            raise ConfigError(f"family {self.family!r} is learned; list it under 'learned', not under 'fixed'")
        return built


class GridSearch(_Strict):
    """The search every fixed family is given: all warped grids t = (1-(1-r)^p)^q with p and q from these lists."""

    p: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    q: Annotated[tuple[Exponent, ...], NotEmpty] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    pairs: int = Field(256, ge=1, strict=True)
    """Validation pairs a grid is scored on; the winner is scored again on all of them."""


class LearnedConfig(_Strict):
    """One learnable family of the sweep. Every list is an axis of the search inside a cell (NFE, guidance).

    ``start`` is a fixed family by name, on its uniform grid, or ``best``: family and grid of the best fixed solver on
    validation pairs, at the same NFE and guidance, and at the sigma0 among ``fixed_sigma0`` that is nearest in ratio.
    """

    family: str
    options: dict[str, Any] = {}
    start: Annotated[tuple[str, ...], NotEmpty, Several] = ("best",)
    learning_rate: Annotated[tuple[Positive, ...], NotEmpty, Several] = (5e-3,)
    sigma0: Annotated[tuple[Positive, ...], NotEmpty, Several] = (1.0,)
    iterations: int = Field(1500, ge=1, strict=True)
    batch_size: int = Field(40, ge=1, strict=True)
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    validate_every: int = Field(100, ge=1, strict=True)

    def build(self) -> LearnableFamily:
        built = plugins.build("families", self.family, self.options)
        if not built.learnable:
            raise ConfigError(
                f"family {self.family!r} has nothing to learn; list it under 'fixed', not under 'learned'"
            )
        return built


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
    trial_cpus: float = Field(0.25, gt=0)
    local_cpus: int | None = Field(None, ge=1, strict=True)
    device: str = Field("cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    request_timeout: float | None = Field(None, gt=0)
    """Seconds after which a host that gives no answer is taken for hung and started again; none by default."""

    @model_validator(mode="after")
    def _device_matches(self) -> Resources:
        if self.device.startswith("cuda") and self.host_gpus == 0:
            raise ValueError(f"device {self.device!r} needs resources.host_gpus above 0, e.g. 1 or 0.5")
        if self.device == "cpu" and self.host_gpus > 0:
            raise ValueError(f"host_gpus is {self.host_gpus:g} but device is 'cpu'; set resources.device to cuda")
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
            plugins.load("metrics", metric)
        if "psnr" not in self.metrics:
            raise ConfigError("metrics must include 'psnr': it is what iterates and grids are chosen by")
        plugins.load("models", self.model.name).check(self.model.options)
        plugins.build("datasets", self.conditioning.name, self.conditioning.options)
        if not self.fixed and not self.learned:
            raise ConfigError("the sweep is empty: list families under 'fixed', 'learned', or both")
        for name, values in self._lists().items():
            # As names of files and runs show them: 1 and 1.0000001 would be one.
            shown = {f"{value:g}" if isinstance(value, float) else value for value in values}
            if not values or len(shown) != len(values):
                raise ConfigError(f"{name} must list different values, at least one; got {list(values)}")
        for solver in self.fixed:
            self._check_nfe(solver)
        if not self.learned and not any(solver.nfes(self.nfe) for solver in self.fixed):
            raise ConfigError(
                f"no fixed family runs at any nfe of {list(self.nfe)}; their own 'nfe' lists leave all out"
            )
        for learned in self.learned:
            self._check_learned(learned)
        entries = [canonical_json([learned.family, learned.options]) for learned in self.learned]
        if len(set(entries)) != len(entries):
            raise ConfigError(
                "'learned' lists a family twice with the same options, and their results would be one row; list the "
                "settings as axes instead, e.g. 'learning_rate: [1.0e-3, 5.0e-3]'"
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
            try:
                family.steps(nfe)
            except ValueError as error:
                allowed = [n for n in solver.nfes(self.nfe) if n % family.evaluations_per_step == 0]
                hint = f"give {solver.family} its own 'nfe: {allowed}'" if allowed else f"leave {solver.family} out"
                raise ConfigError(f"fixed family {solver.family!r} at nfe {nfe}: {error}, or {hint}") from error

    def _check_learned(self, learned: LearnedConfig) -> None:
        learned.build()
        for start in learned.start:
            if start == "best":
                if not self.fixed:
                    raise ConfigError(
                        f"learned family {learned.family!r} starts from the best fixed solver, but 'fixed' is empty; "
                        f"list families there or name a start, e.g. 'start: midpoint'"
                    )
                reachable = {n for solver in self.fixed for n in solver.nfes(self.nfe)}
                missing = [n for n in self.nfe if n not in reachable]
                if missing:
                    raise ConfigError(f"no fixed family runs at nfe {missing[0]}, so 'start: best' has nothing there")
                continue
            for nfe in self.nfe:
                try:
                    SolverConfig(family=start).build().steps(nfe)
                except ValueError as error:
                    raise ConfigError(f"start {start!r} of {learned.family!r} at nfe {nfe}: {error}") from error

    def grids(self) -> list[Grid]:
        """The grids that a fixed family is searched over; the common (uniform) one first."""
        search = self.grid_search
        if search is None:
            return [Grid()]
        return [Grid(), *(Grid("warped", p, q) for p in search.p for q in search.q if (p, q) != (1, 1))]


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

    Raises:
        ConfigError: No such file, not YAML, not a mapping, or an override that is no ``key=value``.
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
    for override in overrides:
        _apply(content, override)
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value, e.g. pairs.train=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from error
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
    root = storage.removeprefix("file://")
    if "://" in root:
        raise ConfigError(
            f"storage {storage!r} is remote, and MLflow's SQLite store cannot be kept there; give --tracking-uri, e.g. "
            f"http://head:5000 of an `mlflow server`"
        )
    return f"sqlite:///{Path(root).expanduser().absolute() / 'mlflow.db'}"


def cpu_budget(resources: Resources) -> int:
    """CPUs that a local Ray gets: what is configured, else every core."""
    return resources.local_cpus or os.cpu_count() or 1
