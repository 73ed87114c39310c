"""Sweeps on a local Ray: every point gets one result and one run, and no work is repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import parse_config
from orchestrator.errors import BusyStoreError, PoolError
from orchestrator.lock import exclusive
from orchestrator.reports.drawing.kinds import DRAWINGS, Drawing
from orchestrator.reports.gallery import make_gallery
from orchestrator.results.store import ResultStore
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import KEY, PARENT, ROLE, Tracker
from orchestrator.tracking.uri import resolve_tracking_uri
from solvers.theta import load_theta
from sweeps.evaluate import FoundTheta, evaluate_thetas
from sweeps.sweep import SweepOutcome, run_sweep


@pytest.fixture
def sweep(copied: Storage, experiment: dict[str, Any]) -> Callable[..., ExperimentConfig]:
    """Makes the configuration of the small experiment, with changes, on a storage that already has its pairs."""

    def configure(**changes: Any) -> ExperimentConfig:
        config = parse_config({**experiment, "storage": copied.root, **changes}, "the small experiment")
        config.check()
        return config

    return configure


def test_a_second_sweep_on_a_busy_store_fails_at_once_with_no_wait(
    sweep: Callable[..., ExperimentConfig], copied: Storage
) -> None:
    """It fails before Ray starts; the message names the current owner."""
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
    """Points stopped by ASHA keep their last state. A named start that is also the best one gives one point, not two.

    Trials run one at a time, the good learning rate first. With several at once, the order of their reports would
    decide which of them are stopped.

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
    notes: list[str] = []
    outcome = run_sweep(config, address=None, wait=False, announce=notes.append)
    assert outcome.failed == {}
    assert len(copied.names("points")) == 1 + 4
    statuses = _statuses(copied)
    assert len(statuses) == 4
    assert "finished" in statuses
    assert "stopped" in statuses
    best = {row.kind: row.metrics["psnr_db"] for row in outcome.rows}
    assert best["learned"] > best["start"] == best["common grid"]
    _one_finished_run_per_point(copied, config)

    notes.clear()
    again = run_sweep(config, address=None, wait=False, announce=notes.append)
    assert notes == [
        "fixed solvers: 1 of 1 points are complete, reused",
        "distillation: 4 of 4 points are complete, reused",
    ]
    assert again.rows == outcome.rows
    _one_finished_run_per_point(copied, config)


def _one_finished_run_per_point(storage: Storage, config: ExperimentConfig) -> None:
    """Check for one run of the sweep, one run under it per point, and no two runs with the same key."""
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
def test_pictures_that_fail_take_no_result_with_them(
    sweep: Callable[..., ExperimentConfig], copied: Storage, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that cannot be decoded and figures that cannot be drawn each cost a sentence: of the sweep and of the
    evaluation, tables, thetas and MLflow's numbers are there, and both commands succeed.
    """

    def undecodable(*arguments: Any) -> Any:
        raise PoolError("the host died: out of memory while decoding")

    def undrawable(*arguments: Any) -> Any:
        raise ValueError("Invalid shape (2,) for image data")

    notes: list[str] = []
    config = sweep(fixed=["euler"], grid_search=None)
    monkeypatch.setattr("orchestrator.reports.gallery._strips", undecodable)
    monkeypatch.setattr("orchestrator.reports.sweep.curves", undrawable)
    swept = run_sweep(config, address=None, wait=False, announce=notes.append)
    report = Path(swept.report)
    assert "These samples could not be made: the host died: out of memory" in report.read_text(encoding="utf-8")
    assert len([note for note in notes if note.endswith("ValueError: Invalid shape (2,) for image data.")]) == 3
    assert "BNS,learned,4" in (report.parent / "comparison.csv").read_text(encoding="utf-8")
    _one_finished_run_per_point(copied, config)

    monkeypatch.undo()
    monkeypatch.setitem(DRAWINGS, "image", Drawing(undrawable, "drawn"))
    assert swept.thetas is not None
    (file,) = Path(swept.thetas).iterdir()
    theta = FoundTheta(str(file), load_theta(file))
    evaluated = evaluate_thetas(
        config, [theta], address=None, wait=False, allow_transfer=False, announce=lambda sentence: None
    )
    report = Path(evaluated.report)
    assert "This figure could not be drawn: " in report.read_text(encoding="utf-8")
    assert "PSNR (dB)" in (report.parent / "tables.md").read_text(encoding="utf-8")
    tracker = Tracker(resolve_tracking_uri(None, copied.root))
    (run,) = [run for run in tracker.latest_trials(config.name) if run.data.params["kind"] == "learned"]
    assert run.data.metrics["labels/psnr_db"] == pytest.approx(run.data.metrics["psnr_db"])


@pytest.mark.cluster
@pytest.mark.slow
def test_results_of_another_experiment_are_reused_and_recorded(
    sweep: Callable[..., ExperimentConfig], copied: Storage, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same points under another experiment name are not computed again, but that experiment gets its own runs.

    The hosts of the first sweep take fractions of a fake GPU, and its trials run on the CPU cores.

    """
    in_use: list[float] = []

    def watched(*arguments: Any) -> Any:
        in_use.append(ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0))
        return make_gallery(*arguments)

    monkeypatch.setattr("sweeps.sweep.make_gallery", watched)
    config = sweep(learned=[], grid_search=None)
    # Not validated by check(): outside tests, a host with a GPU would compute on it.
    on_gpu = config.model_copy(update={"resources": config.resources.model_copy(update={"host_gpus": 0.5})})
    first: SweepOutcome = run_sweep(on_gpu, address=None, wait=False, announce=lambda sentence: None)
    assert in_use == [1.0]
    notes: list[str] = []
    other = sweep(name="other", learned=[], grid_search=None)
    second = run_sweep(other, address=None, wait=False, announce=notes.append)
    assert notes == ["fixed solvers: 2 of 2 points are complete, reused"]
    assert second.rows == first.rows
    _one_finished_run_per_point(copied, other)
    report = Path(second.report)
    assert report == Path(copied.root) / "experiments/other/report.html"
    assert yaml.safe_dump("other").strip("\n.") in report.read_text(encoding="utf-8")
