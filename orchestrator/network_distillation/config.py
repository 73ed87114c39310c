"""The configuration of ``bespoke distil-network``: one model, and the solvers and networks distilled from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator import plugins
from orchestrator.config.base import NFE, Model, NotEmpty, PluginConfig, Positive, Several, Source, Strict
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import read_yaml, validated
from orchestrator.config.sections import PairsConfig
from orchestrator.config.solvers import GridSearch, LearnedConfig, SolverConfig
from orchestrator.errors import ConfigError
from orchestrator.features.moments import reference_moments
from orchestrator.models.zoo import ZooModel
from orchestrator.network_distillation.progressive import check_prediction, stages
from orchestrator.network_distillation.students import student_solver
from orchestrator.network_distillation.weights import Loss
from solvers.distil.methods.adam import Decay

Count = Annotated[int, Field(ge=1, strict=True)]


def _bare_family(value: Any) -> Any:
    """Expand ``euler`` to ``{family: euler}``."""
    return {"family": value} if isinstance(value, str) else value


class WeightsConfig(Strict):
    """Settings of distilling the weights towards ground truth (BST K.4), at every NFE.

    ``loss`` is 'lte' (eq. 80: error of each midpoint step from the ground-truth trajectory) or 'rmse' (eq. 6: error of
    the sample).
    """

    loss: Loss
    trajectories: Count = 520
    iterations: Count = 1000
    batch_size: Count = 40
    learning_rate: Positive = 2e-4
    decay: Decay = "polynomial"
    validate_every: Count = 100


class ProgressiveConfig(Strict):
    """Settings of Progressive Distillation (Salimans & Ho 2022): one chain of halvings through every NFE."""

    start_steps: Count = 64
    iterations: Count = 1000
    """Iterations per halving."""
    batch_size: Count = 128
    learning_rate: Positive = 2e-4
    decay: Decay = "polynomial"


class NetworkDistillationConfig(Strict):
    """One comparison: ground truth, fixed solvers, distilled solvers and distilled networks of one zoo model, unguided.

    ``pairs.test`` is the number of test pairs: every method is sampled from their noise, for PSNR and Frechet distance.
    ``dataset`` is the real data: the reference of the distance, and the training set of progressive distillation.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: Model
    conditioning: Source = PluginConfig(name="labels")
    pairs: PairsConfig = PairsConfig()
    nfe: Annotated[tuple[NFE, ...], NotEmpty, Several]
    fixed: tuple[Annotated[SolverConfig, BeforeValidator(_bare_family)], ...] = ()
    grid_search: GridSearch | None = None
    learned: tuple[Annotated[LearnedConfig, BeforeValidator(_bare_family)], ...] = ()
    weights: tuple[WeightsConfig, ...] = ()
    progressive: ProgressiveConfig | None = None
    features: str = "digits_cnn"
    dataset: str = "digits"
    seed: int = Field(0, ge=0, lt=1000, strict=True)
    workers: Count = 1
    """Networks trained in parallel: 1 trains in this process, more train as Ray tasks of one CPU each."""
    storage: str = "bespoke-data"
    tracking_uri: str | None = None

    def experiment(self) -> ExperimentConfig:
        """The solver part as an experiment, with the same pairs and points as a sweep."""
        shared = NetworkDistillationConfig.model_fields.keys() & ExperimentConfig.model_fields.keys()
        return ExperimentConfig(**{name: getattr(self, name) for name in shared}, seeds=(self.seed,), metrics=("psnr",))

    def check(self) -> None:
        """Refuse, before any work starts, everything that cannot succeed.

        Raises:
            ConfigError: The message names the key, the value and the remedy.
        """
        if self.model.name != "zoo":
            raise ConfigError(
                f"model adapter {self.model.name!r} has no weights that can be trained here; network distillation "
                f"takes models of the zoo: {{name: zoo, options: {{weights: NAME or PATH}}}}"
            )
        self.experiment().check()
        if not self.learned:
            raise ConfigError("'learned' is empty: the comparison needs a distilled solver, e.g. {family: bns}")
        for entry in self.weights:
            self._check_weights(entry)
        if len(set(self.weights)) != len(self.weights):
            raise ConfigError(
                "'weights' lists the same settings twice, and their students would be one row; remove one"
            )
        if self.progressive is not None:
            check_prediction(ZooModel(**self.model.options))
            for nfe in self.nfe:
                stages(self.progressive.start_steps, nfe)
        self._check_features()

    def _check_weights(self, entry: WeightsConfig) -> None:
        for nfe in self.nfe:
            try:
                student_solver("midpoint", nfe)
            except ValueError as error:
                raise ConfigError(f"'weights' trains midpoint steps, but nfe has {nfe}: {error}") from error
        if entry.validate_every > entry.iterations:
            raise ConfigError(
                f"weights.validate_every is {entry.validate_every}, above its {entry.iterations} iterations: no "
                f"trained iterate would be kept; use at most {entry.iterations}"
            )

    def _check_features(self) -> None:
        extractor = plugins.build("features", self.features)
        try:
            count = extractor.dim(ZooModel(**self.model.options).shape)
        except ValueError as error:
            raise ConfigError(f"features: {error}") from error
        reference_moments(self.features, self.dataset)
        if plugins.build("datasets", self.dataset).reference() is None:
            raise ConfigError(f"dataset {self.dataset!r} has no real samples; choose one that has, e.g. digits")
        if self.pairs.test <= count:
            raise ConfigError(
                f"pairs.test is {self.pairs.test}, but {self.features} has {count} features: a Frechet "
                f"distance needs more samples than features, preferably ten times as many"
            )


def load_network_config(path: str, overrides: Sequence[str] = ()) -> NetworkDistillationConfig:
    """Read and check a comparison; ``overrides`` are those of :func:`orchestrator.config.reading.load_config`.

    Raises:
        ConfigError: The message names the key, the value and the remedy.
    """
    config = validated(NetworkDistillationConfig, read_yaml(path, overrides), path)
    config.check()
    return config
