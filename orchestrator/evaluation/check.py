"""Checks of an evaluation before anything starts: its datasets, metrics, real samples and baselines."""

from __future__ import annotations

from collections import Counter

from orchestrator import plugins
from orchestrator.config.base import PluginConfig, in_section
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.evaluation.real import check_real_samples
from orchestrator.metrics.base import Metric
from orchestrator.metrics.measurements import MetricSpec
from orchestrator.models.base import ModelAdapter


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
    model: ModelAdapter | None = adapter.without_network(config.model.options)
    count = config.evaluation.samples or config.pairs.test
    checked: list[Dataset] = []
    for name, dataset in datasets(config).items():
        with in_section(f"evaluation.datasets.{name}"):
            built = dataset.build("datasets")
            built.check()
            adapter.check_conditioning(config.model.options, built)
        for spec in specs:
            try:
                _check_counts(spec.metric, count, "evaluation.samples")
                shape = None
                if model is not None:
                    spec.check_samples(model.shown_kind, model.shape, None if model.decodes else model.shape, count)
                    shape = model.shape if spec.metric.sees == "samples" or not model.decodes else None
                spec.metric.check(built)
                source = spec.metric.real(built)
                if source is None:
                    continue
                if source not in checked:
                    source.check_real()
                    checked.append(source)
                _check_counts(spec.metric, source.real_count(), f"the real samples of {type(source).__name__}")
                if model is not None and shape is not None:
                    check_real_samples(spec, source, shape, model.shown_range)
            except (ConfigError, ValueError) as error:
                raise ConfigError(f"evaluation on {name!r}: {error}") from error
    for number, baseline in enumerate(config.evaluation.baselines):
        with in_section(f"evaluation.baselines.{number}"):
            baseline.build()
            _ = baseline.fixed_grid


def _check_counts(metric: Metric, count: int, what: str) -> None:
    if count < metric.fewest:
        raise ConfigError(f"{metric.column} needs at least {metric.fewest} samples, but {what} are {count}; use more")
