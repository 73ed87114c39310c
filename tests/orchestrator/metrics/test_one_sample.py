"""The ends of the range: metrics of one sample, of none that is finite, and of one word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from metric_examples import built

from orchestrator import plugins
from orchestrator.datasets.labels import Labels
from orchestrator.evaluation.bootstrap import compare
from orchestrator.metrics.base import Array, MeanMetric, Metric, RateMetric

ONE = {MeanMetric: np.array([[7.0]]), RateMetric: np.array([[1.0, 4.0]])}
AVERAGED = [name for name, plugin in plugins.every("metrics") if issubclass(plugin, MeanMetric | RateMetric)]


def one(metric: Metric) -> Array:
    """The measurement of one sample."""
    return next(values for kind, values in ONE.items() if isinstance(metric, kind))


@pytest.mark.parametrize("name", AVERAGED)
def test_one_sample_has_a_value_and_no_error(name: str) -> None:
    """Its standard error is 0, which tables leave out, and no solver is called better because of it."""
    metric = built(name)
    values = one(metric)
    summary = metric.summarise([values], Labels())
    assert (summary.count, summary.stderr, summary.not_finite) == (1, 0, 0)
    assert math.isfinite(summary.mean)
    assert compare(metric, {"a": values, "b": values + 1}) == []


@pytest.mark.parametrize("name", AVERAGED)
def test_samples_that_are_not_finite_leave_no_value(name: str) -> None:
    """One of one: NaN, counted."""
    summary = built(name).summarise([one(built(name)) * np.nan], Labels())
    assert math.isnan(summary.mean)
    assert (summary.count, summary.not_finite) == (0, 1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_set_of_one_class_or_one_prompt_draws_it_for_every_pair(count: int) -> None:
    """With more, every one is drawn."""
    for name, options in (("labels", {"classes": count}), ("prompts", {"prompts": ["a", "b", "c"][:count]})):
        dataset = plugins.build("datasets", name, options)
        dataset.check()
        assert set(dataset.conditions(0, range(50)).tolist()) == set(range(count))
