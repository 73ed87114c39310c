"""A distillation method is one file: the one in docs/extending.md distils like the shipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distillation import third_method_source
from trial_example import trial_context

import solvers.distil.methods
from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey
from orchestrator.config.reading import parse_config
from orchestrator.errors import ConfigError
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from solvers.grids import Grid
from sweeps.point import LearnedPoint, SolverChoice, point_from_dict
from sweeps.points.execute import TrialContext, mlflow_parameters, run_point
from sweeps.space import learned_points

EULER = SolverChoice(family="euler", options={}, label="Euler", grid=Grid())


@pytest.fixture
def gradient_descent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of the how-to, as a file beside the shipped ones."""
    (tmp_path / "gradient_descent.py").write_text(third_method_source(), encoding="utf-8")
    folders = [*solvers.distil.methods.__path__, str(tmp_path)]
    monkeypatch.setattr(solvers.distil.methods, "__path__", folders)
    return "gradient_descent"


@pytest.fixture
def point(
    gradient_descent: str, experiment: dict[str, Any], specs: dict[PairKey, PairSpec], facts: ModelFacts
) -> LearnedPoint:
    experiment["learned"] = [
        {
            "family": "bns",
            "method": {"name": gradient_descent, "options": {"rate": 2e-4}},
            "iterations": 20,
            "batch_size": 16,
            "validate_every": 10,
        }
    ]
    config = parse_config(experiment, "third method")
    config.check()
    (point,) = learned_points(config, specs, {(4, 1.0, 1.0): [EULER]}, facts.scheduler)
    return point


@pytest.fixture
def context(made: Storage, facts: ModelFacts, specs: dict[PairKey, PairSpec]) -> TrialContext:
    return trial_context(made, facts)


def test_it_is_listed_and_named_in_tables_and_runs(point: LearnedPoint) -> None:
    assert plugins.names("methods") == ["adam", "gradient_descent", "levenberg_marquardt"]
    assert point.label == "BNS (GD)"
    assert mlflow_parameters(point) | {"method": "gradient_descent", "rate": 2e-4} == mlflow_parameters(point)


def test_a_point_of_it_survives_a_way_through_json(point: LearnedPoint) -> None:
    again = point_from_dict(point.to_dict())
    assert (again, again.key) == (point, point.key)


def test_it_distils_and_its_cost_is_counted(
    point: LearnedPoint, context: TrialContext, pool: LocalPool, copied: Storage
) -> None:
    """Better than its start on the validation pairs; a forward and a backward per evaluation."""
    result = run_point(point, context, pool, copied, lambda values: None)
    assert result.status == "finished"
    assert result.validation_psnr_db > (result.start_validation_psnr_db or 0) + 0.5
    assert result.backwards == 20 * 16 * 4


def test_an_option_that_it_does_not_have_is_refused(gradient_descent: str, experiment: dict[str, Any]) -> None:
    """With the options that it has, before any work."""
    experiment["learned"] = [{"family": "bns", "method": {"name": gradient_descent, "options": {"rat": 1.0}}}]
    refusal = (
        r"distillation method 'gradient_descent' has no option 'rat' \(did you mean 'rate'\?\); its options are: rate "
    )
    with pytest.raises(ConfigError, match=refusal):
        parse_config(experiment, "third method")


def test_a_key_of_another_method_is_refused(gradient_descent: str, experiment: dict[str, Any]) -> None:
    experiment["learned"] = [{"family": "bns", "method": gradient_descent, "jacobian": "central"}]
    with pytest.raises(ConfigError, match="'jacobian' has no meaning for method 'gradient_descent'"):
        parse_config(experiment, "third method")


def test_an_unknown_method_is_refused_with_the_known_ones(experiment: dict[str, Any]) -> None:
    experiment["learned"] = [{"family": "bns", "method": "adan"}]
    with pytest.raises(
        ConfigError, match=r"unknown distillation method 'adan' \(did you mean 'adam'\?\); there are: adam,"
    ):
        parse_config(experiment, "third method")


@pytest.mark.parametrize(
    ("key", "setter"), [("learning_rate", "own key"), ("iterations", "own key"), ("training_pairs", "`pairs.train`")]
)
def test_an_option_that_is_set_elsewhere_is_refused(experiment: dict[str, Any], key: str, setter: str) -> None:
    """With the place that sets it: two values for one setting would contradict each other."""
    experiment["learned"] = [{"family": "bns", "method": {"name": "adam", "options": {key: 1}}}]
    with pytest.raises(ConfigError, match=rf"method\.options: '{key}' is set by .*{setter}"):
        parse_config(experiment, "third method")
