"""``bespoke distil-network``: one command from pairs to table, resumable, with the same results under Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli.main import main
from orchestrator.errors import BusyStoreError, StoreError, UserError
from orchestrator.lock import exclusive
from orchestrator.network_distillation.config import NetworkDistillationConfig, WeightsConfig
from orchestrator.network_distillation.students import Student, StudentResult
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import ROLE, Tracker
from sweeps.distil_network import _weights_name, _Work, run_comparison
from sweeps.student_jobs import Job, train

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
    "conditioning": {"name": "digits"},
    "pairs": {
        "train": 16,
        "validation": 16,
        "test": 80,
        "rtol": 1e-3,
        "atol": 1e-3,
        "batch_size": 16,
        "shard_size": 80,
    },
    "nfe": [4],
    "fixed": ["midpoint"],
    "learned": [{"family": "bns", "iterations": 4, "batch_size": 8, "validate_every": 2}],
    "weights": [
        {"loss": "lte", "trajectories": 24, "iterations": 2, "validate_every": 1, "batch_size": 8},
        {"loss": "rmse", "trajectories": 16, "iterations": 2, "validate_every": 1, "batch_size": 8},
    ],
    "progressive": {"start_steps": 8, "iterations": 2, "batch_size": 8},
}
METHODS = {
    "Ground truth (dopri5)",
    "Midpoint",
    "start of BNS",
    "BNS",
    "Weights (LTE)",
    "Weights (RMSE)",
    "Progressive Distillation",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that the command has completed."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    result = _command(folder)
    assert result.exit_code == 0, result.output
    assert "| method | NFE | PSNR (dB) | fid[digits_cnn] |" in result.stdout
    return folder


def _command(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        main, ["distil-network", str(folder / "tiny.yaml"), "--storage", str(folder / "data"), *arguments]
    )


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / "data/network-distillation/tiny/comparison.json").read_text(encoding="utf-8"))
    return {row["method"]: row for row in rows}


def _config(folder: Path, **changes: Any) -> NetworkDistillationConfig:
    return NetworkDistillationConfig(**{**CONTENT, "storage": str(folder / "data"), **changes})


def test_every_method_is_in_the_table(done: Path) -> None:
    """Ground truth, the fixed solver, the start, and both kinds of distillation."""
    assert set(_rows(done)) == METHODS


def test_each_row_has_its_cost(done: Path) -> None:
    """Solvers learn no parameters or 17, networks all weights. The cost of ground truth for training is included."""
    rows = _rows(done)
    assert (rows["Midpoint"]["forwards"], rows["Midpoint"]["parameters"]) == (0, 0)
    assert (rows["BNS"]["parameters"], rows["BNS"]["training_set"]) == (17, 16)
    assert rows["BNS"]["forwards"] > 4 * (4 * 8 + 3 * 16), "training and validation, and the ground truth"
    assert (rows["Weights (LTE)"]["training_set"], rows["Weights (RMSE)"]["training_set"]) == (24, 16)
    assert rows["Weights (RMSE)"]["parameters"] == rows["Progressive Distillation"]["parameters"] == 648_640
    assert (rows["Progressive Distillation"]["training_set"], rows["Progressive Distillation"]["forwards"]) == (
        1797,
        48,
    )
    assert rows["BNS"]["bytes"] < 2000 < 2_000_000 < rows["Weights (LTE)"]["bytes"]


def test_a_distilled_solver_is_never_worse_than_its_start_on_validation(done: Path) -> None:
    """All methods use the same samples, so on the test noise it is at least about as good."""
    rows = _rows(done)
    assert rows["start of BNS"]["psnr_db"] == rows["Midpoint"]["psnr_db"]
    assert rows["BNS"]["psnr_db"] > rows["Midpoint"]["psnr_db"] - 0.1
    assert "psnr_db" not in rows["Ground truth (dopri5)"], "JSON has no infinity"


def test_the_second_run_reuses_everything(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no pair and no optimiser step, and the table is the same."""
    before = _rows(done)

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Student, "descend", refuse)
    monkeypatch.setattr("orchestrator.hosts.host.Host.advance", refuse)
    monkeypatch.setattr("orchestrator.hosts.host.Host.make_shard", refuse)
    result = _command(done)
    assert result.exit_code == 0, result.output
    assert _rows(done) == before


def test_every_row_is_a_run_in_mlflow(done: Path) -> None:
    """The Fréchet distance is logged under the name of its features."""
    tracker = Tracker(f"sqlite:///{done}/data/mlflow.db")
    experiment = tracker.experiment("tiny", None)
    runs = tracker.client.search_runs([experiment], f"tags.`{ROLE}` = 'network distillation row'")
    assert {run.data.params["method"] for run in runs} == METHODS
    rows = _rows(done)
    for run in runs:
        assert run.data.metrics["fid/digits_cnn"] == pytest.approx(rows[run.data.params["method"]]["fid"])
    (parent,) = tracker.client.search_runs([experiment], f"tags.`{ROLE}` = 'network distillation'")
    assert parent.info.status == "FINISHED"
    names = {artifact.path for artifact in tracker.client.list_artifacts(parent.info.run_id)}
    assert names == {"comparison.md", "comparison.png"}


def test_a_comparison_in_progress_elsewhere_is_refused_with_no_wait(done: Path) -> None:
    """The error is raised at once."""
    storage = Storage.at(done / "data")
    held = exclusive(storage, "network-distillation/tiny/.lock", wait=False, announce=lambda s: None)
    with held, pytest.raises(BusyStoreError, match="network-distillation/tiny is in use by"):
        run_comparison(_config(done), address=None, wait=False)


def test_a_misspelt_key_is_refused_by_the_command(done: Path) -> None:
    """Exit code 2 and one sentence, without a traceback."""
    result = _command(done, "progresive.iterations=3")
    assert result.exit_code == 2
    assert "progresive: unknown key (did you mean 'progressive'?)" in result.stderr


def test_row_names_of_students_of_one_loss_contain_what_differs() -> None:
    """Settings that do not differ are left out."""
    entries = [WeightsConfig(loss="lte"), WeightsConfig(loss="lte", trajectories=64), WeightsConfig(loss="rmse")]
    names = [_weights_name(entry, entries) for entry in entries]
    assert names == ["Weights (LTE), 520", "Weights (LTE), 64", "Weights (RMSE)"]


@pytest.mark.cluster
def test_ray_tasks_train_the_same_students(done: Path, tmp_path: Path, ray_session: None) -> None:
    """They equal the students trained in this process bit for bit, and user errors arrive unwrapped."""
    work = _Work(_config(done), Storage.at(done / "data"))
    jobs = work.jobs()
    local = [results for _, results in train(jobs, work.storage, 1, None)]
    elsewhere = Storage.at(tmp_path)
    for digest in {spec.digest for spec in (work.validation, *work.larger.values())}:
        for name in work.storage.names(f"pairs/{digest}"):
            elsewhere.write(f"pairs/{digest}/{name}", work.storage.read(f"pairs/{digest}/{name}"))
    remote = [results for _, results in train(jobs, elsewhere, 2, None)]
    assert remote == local
    for result in _flat(local):
        key = f"students/{result.key}/nfe{result.nfe}.safetensors"
        assert elsewhere.read(key) == work.storage.read(key)
    with pytest.raises(StoreError, match="no complete pair store"):
        train(jobs[:1], Storage.at(tmp_path / "empty"), 2, None)


def _flat(results: list[list[StudentResult]]) -> list[StudentResult]:
    return [result for group in results for result in group]


def test_a_user_error_in_a_local_job_is_raised_unwrapped(done: Path, tmp_path: Path) -> None:
    """The error names the missing pairs."""
    jobs: list[Job] = _Work(_config(done), Storage.at(done / "data")).jobs()
    with pytest.raises(UserError, match="no complete pair store"):
        train(jobs[:1], Storage.at(tmp_path), 1, None)
