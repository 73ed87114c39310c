"""Evaluations against real samples of any shape, from arrays: in the range of the model's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.pair_plan import PairKey, pair_spec
from orchestrator.config.reading import parse_config
from orchestrator.datasets.digits import Digits
from orchestrator.errors import ConfigError
from orchestrator.evaluation.cases import Case, Score
from orchestrator.evaluation.check import check_evaluation, metric_specs
from orchestrator.evaluation.run import Evaluation
from orchestrator.evaluation.solvers import EvaluatedSolver
from orchestrator.hosts.host import Host
from orchestrator.hosts.scorer import Scorer
from orchestrator.hosts.settings import HostSettings, ScorerSettings
from orchestrator.metrics.base import to_unit_range
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.grids import Grid


def experiment_of(folder: Path, shape: tuple[int, ...], real: Any, metrics: list[Any], **options: Any) -> Any:
    """An experiment with a closed-form field of this shape, whose conditioning holds real samples."""
    np.savez(folder / "data.npz", data=real)
    return parse_config(
        {
            "name": "any",
            "model": {
                "name": "torch_module",
                "options": {
                    "factory": "own_networks:Gaussian",
                    "shape": list(shape),
                    "prediction": "velocity",
                    "native_scheduler": "cond_ot",
                    **options,
                },
            },
            "conditioning": {"name": "tensors", "options": {"file": str(folder / "data.npz"), "samples": "data"}},
            "pairs": {"train": 16, "validation": 16, "test": 200, "rtol": 1e-3, "atol": 1e-3},
            "nfe": [4],
            "fixed": ["euler"],
            "evaluation": {"metrics": metrics},
        },
        "any.yaml",
    )


def evaluated(config: Any, storage: Storage) -> dict[tuple[str, str], Score]:
    """Scores of Euler and of ground truth, by solver and column."""
    config.check()
    check_evaluation(config)
    settings = HostSettings(adapter=config.model.name, options=dict(config.model.options), storage=storage.root)
    pool = LocalPool(Host(settings))
    facts = pool.host.facts()
    spec = pair_spec(config, facts, PairKey("test", 1.0, 0))
    ensure_pairs(storage, [spec], pool, wait=True, announce=lambda sentence: None)
    euler = GridSolver(Euler(), 2, Grid()).to_ns(facts.scheduler)
    solvers = [
        EvaluatedSolver(kind="baseline", name="Euler", guidance_scale=1.0, ns=euler),
        EvaluatedSolver(kind="ground truth", name="Ground truth", guidance_scale=1.0),
    ]
    cases = [Case(solver=solver, dataset="data", pairs=spec) for solver in solvers]
    scorers = LocalPool(Scorer(ScorerSettings(storage=storage.root)))
    shown = (facts.data_min, facts.data_max)
    evaluation = Evaluation(storage, pool, scorers, cases, metric_specs(config), shown)
    evaluation.check_forms()
    evaluation.measure()
    scores = evaluation.scores({spec.name: 50.0})
    assert not [score.failure for score in scores if score.failure]
    return {(score.case.solver.name, score.metric.metric.column): score for score in scores}


@pytest.mark.parametrize("shape", [(1,), (3,), (6, 2), (2, 3, 2, 2)], ids=str)
def test_real_samples_of_any_shape_are_compared_with(shape: tuple[int, ...], tmp_path: Path, storage: Storage) -> None:
    """Ground truth is close to data of its own distribution, and a coarse solver further away."""
    real = 2 + 0.5 * np.random.default_rng(0).standard_normal((500, *shape))
    config = experiment_of(tmp_path, shape, real, ["frechet", "sliced_wasserstein", "psnr", "coordinate_rmse"])
    scores = evaluated(config, storage)
    assert scores["Euler", "frechet[raw]"].reference == "500 real samples of Tensors"
    for column in ("frechet[raw]", "sliced_wasserstein[raw]"):
        truth, coarse = scores["Ground truth", column].summary, scores["Euler", column].summary
        assert 0 < truth.mean < 0.6 * coarse.mean
        assert (truth.count, coarse.count) == (200, 200)


def test_real_images_in_the_range_of_the_data_are_seen_as_images(tmp_path: Path, storage: Storage) -> None:
    """Digits in [0, 4]: a distance between features is that of the same digits in [-1, 1]."""
    digits = Digits().reference().samples[:300]
    fid = {"name": "fid", "options": {"features": "digits_cnn"}}
    config = experiment_of(tmp_path, (1, 8, 8), 2 * digits + 2, [fid], data_min=0.0, data_max=4.0)
    score = evaluated(config, storage)["Euler", "fid[digits_cnn]"]
    metric: Any = score.metric.metric
    mapped = to_unit_range(torch.from_numpy(2 * digits + 2), (0.0, 4.0))
    torch.testing.assert_close(mapped, torch.from_numpy(digits))
    (real,) = metric._real.values()
    np.testing.assert_allclose(real.mean, metric.extractor(torch.from_numpy(digits)).mean(dim=0).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "real", "metric", "message"),
    [
        (
            (3,),
            (90, 4),
            "frechet",
            r"compares samples of shape \(3,\) with real samples of 'tensors' of shape \(4,\); choose another",
        ),
        (
            (30,),
            (20, 30),
            "frechet",
            r"real samples of 'tensors': frechet\[raw\] fits a covariance to 30 features .*, which 20 samples do not",
        ),
        (
            (3,),
            (90, 3),
            {"name": "frechet", "options": {"reference": {"name": "digits"}}},
            r"compares samples of shape \(3,\) with real images of 'digits' of shape \(1, 8, 8\)",
        ),
    ],
)
def test_real_samples_that_do_not_fit_are_refused_before_hosts_start(
    shape: tuple[int, ...], real: tuple[int, ...], metric: Any, message: str, tmp_path: Path
) -> None:
    """Another shape, or too few; the message names both."""
    config = experiment_of(tmp_path, shape, np.random.default_rng(0).standard_normal(real), [metric])
    with pytest.raises(ConfigError, match=message):
        check_evaluation(config)


def test_images_are_not_compared_with_samples_in_another_range(tmp_path: Path) -> None:
    """Raw values of digits lie in [-1, 1], and those of this model in [0, 1]."""
    metric = {"name": "sliced_wasserstein", "options": {"reference": {"name": "digits"}}}
    data = np.zeros((20, 1, 8, 8))
    config = experiment_of(tmp_path, (1, 8, 8), data, [metric], data_min=0.0, data_max=1.0)
    with pytest.raises(
        ConfigError, match=r"whose data lie in \[0, 1\] with images of 'digits', which lie in \[-1, 1\]"
    ):
        check_evaluation(config)


def test_too_few_samples_for_a_covariance_are_refused_before_hosts_start(tmp_path: Path) -> None:
    """The message has both numbers."""
    config = experiment_of(tmp_path, (300,), np.zeros((900, 300)), ["frechet"])
    message = r"frechet\[raw\] fits a covariance to 300 features per sample, which 200 samples do not determine"
    with pytest.raises(ConfigError, match=message):
        check_evaluation(config)
