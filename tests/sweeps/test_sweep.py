"""The main job on a Ray in this process: every point has a result and a run, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import parse_config
from orchestrator.errors import BusyStoreError
from orchestrator.lock import exclusive
from orchestrator.reports.gallery import make_gallery
from orchestrator.results.store import ResultStore
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import KEY, PARENT, ROLE, Tracker
from orchestrator.tracking.uri import resolve_tracking_uri
from sweeps.sweep import SweepOutcome, run_sweep


@pytest.fixture
def sweep(copied: Storage, experiment: dict[str, Any]) -> Callable[..., ExperimentConfig]:
    """The small experiment on a storage that has its pairs already; with changes."""

    def configure(**changes: Any) -> ExperimentConfig:
        config = parse_config({**experiment, "storage": copied.root, **changes}, "the small experiment")
        config.check()
        return config

    return configure


def test_a_second_sweep_on_a_busy_store_fails_at_once_with_no_wait(
    sweep: Callable[..., ExperimentConfig], copied: Storage
) -> None:
    """Before Ray is started: the message says who is at work."""
    config = sweep()
    with (
        exclusive(copied, f"experiments/{config.name}/.lock", wait=False, announce=lambda sentence: None),
        pytest.raises(BusyStoreError, match=r"experiments/small is in use by .* \(process \d+\) .*leave out --no-wait"),
    ):
        run_sweep(config, address=None, wait=False)


def _statuses(storage: Storage) -> list[str]:
    stores = [ResultStore(storage, key) for key in storage.names("points")]
    return [store.load().status for store in stores if store.load().kind == "learned"]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_sweep_with_early_stopping_has_a_result_and_a_run_for_every_point(
    sweep: Callable[..., ExperimentConfig], copied: Storage, ray_session: None
) -> None:
    """ASHA ends the hopeless: they keep what they had. A named start that is the best one as well is one point.

    One trial runs at a time, the good rate first: with several at once the order of their reports decides who is ended.
    """
    learned = {
        "family": "bns",
        "start": ["best", "euler"],
        "learning_rate": [5e-3, 1e-7, 2e-7, 3e-7],
        "iterations": 40,
        "batch_size": 16,
        "validate_every": 5,
    }
    config = sweep(
        fixed=["euler"],
        grid_search=None,
        learned=[learned],
        search={"scheduler": "asha", "grace_validations": 2, "reduction_factor": 2},
        resources={"hosts": 1, "host_cpus": 0.25, "trial_cpus": 1.5, "local_cpus": 2},
    )
    told: list[str] = []
    outcome = run_sweep(config, address=None, wait=False, announce=told.append)
    assert outcome.failed == {}
    assert len(copied.names("points")) == 1 + 4
    statuses = _statuses(copied)
    assert len(statuses) == 4
    assert "finished" in statuses
    assert "stopped" in statuses
    best = {row.kind: row.metrics["psnr_db"] for row in outcome.rows}
    assert best["learned"] > best["start"] == best["common grid"]
    _one_finished_run_per_point(copied, config)

    told.clear()
    again = run_sweep(config, address=None, wait=False, announce=told.append)
    assert told == [
        "fixed solvers: 1 of 1 points are complete, reused",
        "distillation: 4 of 4 points are complete, reused",
    ]
    assert again.rows == outcome.rows
    _one_finished_run_per_point(copied, config)


def _one_finished_run_per_point(storage: Storage, config: ExperimentConfig) -> None:
    """One run for the sweep, one under it for each point, and no two of the same key."""
    tracker = Tracker(resolve_tracking_uri(None, storage.root))
    runs = tracker.client.search_runs([tracker.experiment(config.name, None)])
    assert len({run.data.tags[KEY] for run in runs}) == len(runs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.data.tags[ROLE] == "sweep"]
    trials = [run for run in runs if run.data.tags[ROLE] == "trial"]
    assert {run.data.tags[PARENT] for run in trials} == {parent.info.run_id}
    assert sorted(run.data.tags[KEY].rpartition("/")[2] for run in trials) == storage.names("points")
    for run in trials:
        assert [artifact.path for artifact in tracker.client.list_artifacts(run.info.run_id)] == ["theta.json"]


@pytest.mark.cluster
@pytest.mark.slow
def test_results_of_another_experiment_are_reused_and_recorded(
    sweep: Callable[..., ExperimentConfig], copied: Storage, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same points under another name are not computed again, and that experiment has its runs all the same.

    The first sweep's hosts take fractions of a GPU that is not there, and its trials run beside them on the cores.
    """
    in_use: list[float] = []

    def watched(*arguments: Any) -> Any:
        in_use.append(ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0))
        return make_gallery(*arguments)

    monkeypatch.setattr("sweeps.sweep.make_gallery", watched)
    config = sweep(learned=[], grid_search=None)
    # Unchecked: outside tests a host on a GPU computes there.
    on_gpu = config.model_copy(update={"resources": config.resources.model_copy(update={"host_gpus": 0.5})})
    first: SweepOutcome = run_sweep(on_gpu, address=None, wait=False, announce=lambda sentence: None)
    assert in_use == [1.0]
    told: list[str] = []
    other = sweep(name="other", learned=[], grid_search=None)
    second = run_sweep(other, address=None, wait=False, announce=told.append)
    assert told == ["fixed solvers: 2 of 2 points are complete, reused"]
    assert second.rows == first.rows
    _one_finished_run_per_point(copied, other)
    report = Path(second.report)
    assert report == Path(copied.root) / "experiments/other/report.html"
    assert yaml.safe_dump("other").strip("\n.") in report.read_text(encoding="utf-8")
