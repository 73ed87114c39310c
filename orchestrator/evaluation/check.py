"""Checks of an evaluation before anything starts: its datasets, metrics, real samples and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from orchestrator import plugins
from orchestrator.config.base import PluginConfig, in_section
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.metrics.base import Metric
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.facts import ModelFacts


def metric_specs(config: ExperimentConfig) -> list[MetricSpec]:
    """The metrics of an evaluation; by default, those of the sweep."""
    if config.evaluation.metrics:
        return [MetricSpec(metric.name, metric.options) for metric in config.evaluation.metrics]
    return [MetricSpec(name) for name in config.metrics]


def datasets(config: ExperimentConfig) -> dict[str, PluginConfig]:
    """The datasets of an evaluation, by their names in tables; by default, the conditioning of the sweep."""
    return config.evaluation.datasets or {config.conditioning.name: config.conditioning}


def check_evaluation(config: ExperimentConfig) -> None:
    """Refuse, before anything starts, what cannot succeed: missing weights, packages, or unsuitable datasets.

    Raises:
        ConfigError: The message names the problem and the remedy.
    """
    specs = metric_specs(config)
    columns: Counter[str] = Counter()
    for number, spec in enumerate(specs):
        with in_section(f"evaluation.metrics.{number}"):
            columns[spec.metric.column] += 1
    if twice := [column for column, count in columns.items() if count > 1]:
        raise ConfigError(f"evaluation.metrics has {twice[0]!r} twice; leave one out")
    adapter = plugins.load("models", config.model.name)
    checked: list[Dataset] = []
    for name, dataset in datasets(config).items():
        with in_section(f"evaluation.datasets.{name}"):
            built = dataset.build("datasets")
            built.check()
            adapter.check_conditioning(config.model.options, built)
        for spec in specs:
            try:
                spec.metric.check(built)
                _check_counts(spec.metric, config.evaluation.samples or config.pairs.test, "evaluation.samples")
                source = spec.metric.real(built)
                if source is None:
                    continue
                if source not in checked:
                    source.check_real()
                    checked.append(source)
                _check_counts(spec.metric, source.real_count(), f"the real samples of {type(source).__name__}")
            except (ConfigError, ValueError) as error:
                raise ConfigError(f"evaluation on {name!r}: {error}") from error
    for number, baseline in enumerate(config.evaluation.baselines):
        with in_section(f"evaluation.baselines.{number}"):
            baseline.build()
            _ = baseline.fixed_grid


def check_media(metrics: Iterable[MetricSpec], facts: ModelFacts, key: str) -> None:
    """Refuse metrics of images or of sound for a model whose samples are neither, before anything is measured.

    Args:
        metrics: The metrics.
        facts: The model.
        key: Key of the configuration that lists the metrics.

    Raises:
        ConfigError: A metric does not fit; the message has its name, what samples are, and the remedy.
    """
    for spec in metrics:
        sees = spec.metric.sees
        if sees in ("samples", facts.makes):
            continue
        remedy = "choose a metric of raw samples, see `bespoke list metrics`"
        if sees == "images" and facts.rate is None:
            remedy += ", or, if samples are images, set the model's option kind to image"
        raise ConfigError(
            f"metric {spec.name!r} measures {sees}, but model {facts.name} makes {facts.makes or facts.kind}; remove "
            f"it from {key}, {remedy}"
        )


def _check_counts(metric: Metric, count: int, what: str) -> None:
    if count < metric.fewest:
        raise ConfigError(f"{metric.column} needs at least {metric.fewest} samples, but {what} are {count}; use more")
