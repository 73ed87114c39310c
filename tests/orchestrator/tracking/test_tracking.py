"""MLflow tracking: runs are reused by key, and results are read back without artifacts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from orchestrator.errors import UserError
from orchestrator.lock import exclusive
from orchestrator.results.store import Result, ResultStore, rows
from orchestrator.storage import Storage
from orchestrator.tracking import mlflow as tracking
from orchestrator.tracking.mlflow import (
    KEY,
    PARENT,
    ROLE,
    SWEEP,
    THETA_FILE,
    RunLog,
    Tracker,
    entity_name,
    open_experiment,
)
from orchestrator.tracking.records import read_run, write_run
from orchestrator.tracking.uri import resolve_tracking_uri, sqlite_path
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.schedulers.cond_ot import CondOT
from solvers.theta import ThetaArtifact

THETA = ThetaArtifact(GridSolver(Midpoint(), 4, Grid()).to_ns(CondOT())).to_json()


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """An MLflow store in SQLite, shared by the tests because creating its tables takes seconds."""
    return Tracker(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/new/mlflow.db")


@pytest.fixture
def experiment(tracker: Tracker, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The id of an experiment for this test alone."""
    return tracker.experiment(request.node.name, str(tmp_path / "artifacts"))


@pytest.fixture
def parent(tracker: Tracker, experiment: str) -> RunLog:
    """The run of a sweep."""
    return tracker.run(experiment, "sweep/x", "x", {ROLE: "sweep"})


def _runs(tracker: Tracker, experiment: str) -> list[Any]:
    return list(tracker.client.search_runs([experiment]))


def _result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "key": "0123456789abcdef",
        "point": {"family": "bns", "nfe": 8, "guidance_scale": 3.0, "sigma0": 1.5, "seed": 2},
        "name": "BNS nfe8",
        "kind": "learned",
        "label": "BNS",
        "grid": "from Euler, uniform",
        "status": "finished",
        "validation_psnr_db": 40.123456789,
        "metrics": {"psnr_db": {"mean": 39.5, "stderr": 0.125}, "rmse": {"mean": 0.02, "stderr": 0.001}},
        "start_metrics": {"psnr_db": {"mean": 30.5, "stderr": 0.25}, "rmse": {"mean": 0.06, "stderr": 0.002}},
        "start_validation_psnr_db": 31.5,
        "forwards": 123_456_789,
        "backwards": 23_456_789,
    }
    return Result(**(values | changes))


def _parameters(result: Result) -> dict[str, Any]:
    return {**result.point, "label": result.label, "kind": result.kind}


def test_a_run_is_reused_by_its_key(tracker: Tracker, experiment: str) -> None:
    """A resumed sweep continues in its runs: one run per key, for any tracker, even after the run was closed."""
    first = tracker.run(experiment, "sweep/a", "a")
    assert tracker.run(experiment, "sweep/a", "another name").run_id == first.run_id
    first.finish({})
    again = Tracker(tracker.uri).run(experiment, "sweep/a", "a")
    assert again.run_id == first.run_id
    assert tracker.client.get_run(first.run_id).info.status == "RUNNING"
    assert tracker.run(experiment, "sweep/b", "b").run_id != first.run_id
    assert len(_runs(tracker, experiment)) == 2


def test_a_trial_has_one_run_per_sweep(tracker: Tracker, experiment: str, parent: RunLog) -> None:
    """The same point in two sweeps has a run in each. Logging its parameters again is not an error."""
    other = tracker.run(experiment, "sweep/y", "y", {ROLE: "sweep"})
    child = tracker.trial_run(experiment, parent.run_id, "point", "BNS nfe8", {"nfe": 8})
    assert tracker.trial_run(experiment, parent.run_id, "point", "BNS nfe8", {"nfe": 8}).run_id == child.run_id
    assert tracker.trial_run(experiment, other.run_id, "point", "BNS nfe8", {"nfe": 8}).run_id != child.run_id
    run = tracker.client.get_run(child.run_id)
    assert run.data.tags[PARENT] == run.data.tags[SWEEP] == parent.run_id
    assert run.data.tags[ROLE] == "trial"
    assert run.data.tags[KEY] == f"{parent.run_id}/point"
    assert run.data.params == {"nfe": "8"}


def test_a_trial_is_listed_once_it_is_finished(tracker: Tracker, experiment: str, parent: RunLog) -> None:
    """Metrics, parameters and artifacts are written before the run is listed as finished."""
    child = tracker.trial_run(experiment, parent.run_id, "point", "BNS nfe8", {})
    assert tracker.runs_of(experiment, parent.run_id, "trial") == {}
    child.finish({"psnr_db": 40.0}, texts={"theta.json": "{}"}, parameters={"status": "finished"})
    assert list(tracker.runs_of(experiment, parent.run_id, "trial")) == ["point"]
    run = tracker.client.get_run(child.run_id)
    assert run.data.metrics == {"psnr_db": 40.0}
    assert [artifact.path for artifact in tracker.client.list_artifacts(child.run_id)] == ["theta.json"]


def test_a_curve_is_logged_with_its_own_steps(tracker: Tracker, experiment: str) -> None:
    """PSNR is logged at step = NFE, so that the UI draws the family's curve."""
    log = tracker.run(experiment, "summary", "s")
    log.curve("psnr_db_vs_nfe", [(4, 30.0), (8, 40.0), (16, 50.0)])
    log.metrics({"loss": 0.5}, step=7)
    history = tracker.client.get_metric_history(log.run_id, "psnr_db_vs_nfe")
    assert sorted((metric.step, metric.value) for metric in history) == [(4, 30.0), (8, 40.0), (16, 50.0)]
    assert tracker.client.get_metric_history(log.run_id, "loss")[0].step == 7


def test_pairs_are_an_input_of_the_sweep(tracker: Tracker, parent: RunLog) -> None:
    """The digest and location of the pairs of a comparison are recorded. Logging them twice records them once."""
    for _ in range(2):
        parent.pairs("train pairs", "0123456789abcdef", "/data/pairs/0123456789abcdef", "train")
    (dataset_input,) = tracker.client.get_run(parent.run_id).inputs.dataset_inputs
    assert dataset_input.dataset.digest == "0123456789abcdef"
    assert "/data/pairs/0123456789abcdef" in dataset_input.dataset.source
    assert [(tag.key, tag.value) for tag in dataset_input.tags] == [("mlflow.data.context", "train")]


def test_runs_of_a_sweep_are_listed_by_role_and_key(tracker: Tracker, experiment: str, parent: RunLog) -> None:
    """Curves of an earlier comparison can be distinguished from the current ones and deleted separately."""
    other = tracker.run(experiment, "sweep/y", "y", {ROLE: "sweep"})
    for sweep in (parent, other):
        tracker.trial_run(experiment, sweep.run_id, "point", "trial", {}).finish({})
        for key in ("old", "new"):
            tracker.summary_run(experiment, sweep.run_id, key, key, {}).finish({})
    summaries = tracker.runs_of(experiment, parent.run_id, "summary")
    assert set(summaries) == {"old", "new"}
    assert set(tracker.runs_of(experiment, parent.run_id, "trial")) == {"point"}
    tracker.delete(summaries["old"])
    assert set(tracker.runs_of(experiment, parent.run_id, "summary")) == {"new"}
    assert set(tracker.runs_of(experiment, other.run_id, "summary")) == {"old", "new"}


def test_all_pages_of_runs_are_read(
    tracker: Tracker, experiment: str, parent: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of a large sweep are read page by page."""
    for index in range(5):
        tracker.trial_run(experiment, parent.run_id, f"point{index}", "trial", {}).finish({})
    real = tracker.client.search_runs
    monkeypatch.setattr(
        tracker.client, "search_runs", lambda *arguments, **named: real(*arguments, **(named | {"max_results": 2}))
    )
    assert set(tracker.runs_of(experiment, parent.run_id, "trial")) == {f"point{index}" for index in range(5)}


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(tracker: Tracker) -> None:
    """MLflow reserves the name of a deleted experiment, so a new one of that name cannot be created."""
    gone_id = tracker.experiment("gone", None)
    tracker.client.delete_experiment(gone_id)
    with pytest.raises(
        UserError,
        match=rf"MLflow experiment 'gone' was deleted; restore it with `MLFLOW_TRACKING_URI={tracker.uri} mlflow "
        rf"experiments restore -x {gone_id}`, or",
    ):
        tracker.experiment("gone", None)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///{folder}/no-database",
        "sqlite:////proc/none/mlflow.db",
        "http://127.0.0.1:9",
        "file://{folder}",
        "x://y",
    ],
)
def test_an_unusable_store_is_refused_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """No database, no folder, a closed port, and kinds that MLflow does not support: the message names the option."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "no-database").write_text("no database", encoding="utf-8")
    address = uri.format(folder=tmp_path)
    for ask in (lambda tracker: tracker.experiment("x", None), lambda tracker: tracker.latest_trials("x")):
        with pytest.raises(UserError) as caught:
            ask(Tracker(address))
        assert str(caught.value).startswith(f"MLflow at {address} cannot be used: ")
        assert str(caught.value).endswith("; check --tracking-uri")


def test_reading_does_not_create_a_store(tmp_path: Path) -> None:
    """`bespoke compare` in the wrong folder must not leave an empty database there."""
    missing = tmp_path / "mlflow.db"
    with pytest.raises(
        UserError, match=rf"no MLflow store at {missing}; run `bespoke sweep` first, or give --storage or"
    ):
        Tracker.open(f"sqlite:///{missing}")
    assert not missing.exists()
    missing.touch()
    Tracker.open(f"sqlite:///{missing}")


def test_a_busy_store_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite with many writers reports "locked" now and then, which is an error only after half a minute."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers = iter([MlflowException("database is locked"), MlflowException("database is locked"), "done"])

    def action() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert tracking._retrying(action) == "done"
    assert pauses == [0.5, 1.0]

    def never() -> None:
        raise MlflowException("database is locked")

    with pytest.raises(MlflowException, match="locked"):
        tracking._retrying(never)
    assert sum(pauses[2:]) > 10


def test_another_error_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong request stays wrong."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))

    def wrong() -> None:
        raise MlflowException("no such run", error_code=1001)

    with pytest.raises(MlflowException, match="no such run"):
        tracking._retrying(wrong)


Recorded = Callable[[Result], tuple[RunLog, ResultStore]]


@pytest.fixture
def recorded(tracker: Tracker, experiment: str, parent: RunLog, storage: Storage) -> Recorded:
    """A function that records the result of a trial in the storage and as a run of the sweep."""

    def record(result: Result) -> tuple[RunLog, ResultStore]:
        store = ResultStore(storage, result.key)
        store.save(result, THETA, [])
        log = tracker.trial_run(experiment, parent.run_id, result.key, result.name, _parameters(result))
        write_run(log, result, store)
        return log, store

    return record


@pytest.mark.parametrize(
    "result",
    [
        _result(),
        _result(
            kind="best grid", label="Euler", grid="warped p=1.4 q=1", start_metrics=None, start_validation_psnr_db=None
        ),
        _result(status="diverged", validation_psnr_db=31.5),
        _result(metrics={"psnr_db": {"mean": 39.5, "stderr": 0.125, "not_finite": 3}}),
    ],
    ids=["learned", "fixed", "diverged", "partly exploded"],
)
def test_a_run_is_read_back_as_the_result_it_records(tracker: Tracker, recorded: Recorded, result: Result) -> None:
    """Every value of a comparison is exact to the last bit, from parameters and metrics alone."""
    log, store = recorded(result)
    read, theta = read_run(tracker.client.get_run(log.run_id))
    assert theta == store.theta_location
    for field in ("key", "point", "name", "kind", "label", "grid", "status", "validation_psnr_db", "metrics"):
        assert getattr(read, field) == getattr(result, field), field
    for field in ("start_metrics", "start_validation_psnr_db", "forwards", "backwards"):
        assert getattr(read, field) == getattr(result, field), field
    assert rows([read]) == rows([result])
    assert tracker.client.list_artifacts(log.run_id)[0].path == "theta.json"


def test_scores_of_an_evaluation_are_not_part_of_the_sweeps_result(tracker: Tracker, recorded: Recorded) -> None:
    """They are logged later on some of the same runs, and the comparison stays the same."""
    log, _ = recorded(_result())
    before = read_run(tracker.client.get_run(log.run_id))
    log.curves_once("scores", {"george/snr_db": [(0, 50.0)], "george/snr_db_stderr": [(0, 0.1)]})
    assert tracker.client.get_run(log.run_id).data.metrics["george/snr_db"] == 50.0
    assert read_run(tracker.client.get_run(log.run_id)) == before


def test_the_same_curves_are_logged_once(tracker: Tracker, experiment: str, parent: RunLog) -> None:
    """Repeating an evaluation adds nothing unless its values have changed."""
    for value in (1.0, 1.0, 2.0):
        parent.curves_once("curves", {"digits/psnr_db_vs_nfe": [(4, value), (8, 3.0)]})
    history = tracker.client.get_metric_history(parent.run_id, "digits/psnr_db_vs_nfe")
    assert sorted((point.step, point.value) for point in history) == [(4, 1.0), (4, 2.0), (8, 3.0), (8, 3.0)]


def test_the_newest_run_of_every_theta_is_indexed_by_its_digest(
    tracker: Tracker, experiment: str, recorded: Recorded
) -> None:
    """The file name does not matter: an evaluation logs its scores on the trial that learned the theta."""
    log, _ = recorded(_result())
    digest = ThetaArtifact.from_json(THETA, origin="theta").digest
    assert tracker.thetas(experiment)[digest].info.run_id == log.run_id


def test_the_latest_trials_are_the_finished_ones_of_the_newest_sweep(
    tracker: Tracker, experiment: str, request: pytest.FixtureRequest
) -> None:
    """Running trials, summaries, and trials of an earlier model under the same name are left out."""
    for name in ("earlier", "newest"):
        parent = tracker.run(experiment, f"sweep/{name}", name, {ROLE: "sweep"})
        tracker.trial_run(experiment, parent.run_id, "done", f"{name} done", {}).finish({})
        tracker.trial_run(experiment, parent.run_id, "running", f"{name} running", {})
        tracker.summary_run(experiment, parent.run_id, "summary", f"{name} summary", {}).finish({})
        time.sleep(0.01)  # start times are in milliseconds
    assert [run.info.run_name for run in tracker.latest_trials(request.node.name)] == ["newest done"]


def test_an_experiment_that_does_not_exist_is_refused_with_the_existing_ones(tracker: Tracker, experiment: str) -> None:
    """The name is misspelt, or the experiment has no sweep yet."""
    with pytest.raises(
        UserError, match=r"no experiment 'digit' in MLflow at sqlite:.*; existing experiments: .*test_an_experiment"
    ):
        tracker.latest_trials("digit")
    with pytest.raises(UserError, match=r"experiment '.*' has no sweep yet; run `bespoke sweep`"):
        tracker.latest_trials(tracker.client.get_experiment(experiment).name)


# ---- names, paths, and two at once --------------------------------------------------------------------------------

NAMES = [
    "photos/clip_score[ViT-L-14@336px]",
    "a'b",
    "a(b",
    "a[b",
    "a]b",
    "../a",
    "/a",
    "a//b",
    ".",
    "x" * 300,
    "größe: 1",
]


def test_every_name_is_made_valid_and_none_stands_for_another(tracker: Tracker, experiment: str) -> None:
    """MLflow would refuse them after all has been measured."""
    names = [entity_name(name) for name in NAMES]
    assert len(set(names)) == len(NAMES)
    assert entity_name("digits/fid/digits_cnn") == "digits/fid/digits_cnn"
    assert names[-1] == NAMES[-1]
    log = tracker.run(experiment, "names", "names")
    for name in NAMES:
        log.curve(f"{entity_name(name)}_stderr", [(0, 1.0)])
    log.metrics(dict.fromkeys(NAMES, 2.0))
    log.parameters(dict.fromkeys(NAMES, "value"))
    data = tracker.client.get_run(log.run_id).data
    assert set(names) <= set(data.metrics)
    assert set(names) == set(data.params)


@pytest.mark.parametrize("key", ["it's", 'a "b"', "a`b", "100%", "a\\b", "%27"])
def test_a_run_is_found_by_a_key_with_any_character(
    tracker: Tracker, experiment: str, parent: RunLog, key: str
) -> None:
    """Keys contain the labels of solvers, which users write."""
    log = tracker.summary_run(experiment, parent.run_id, key, key, {})
    assert tracker.summary_run(experiment, parent.run_id, key, key, {}).run_id == log.run_id
    log.finish({})
    assert key in tracker.runs_of(experiment, parent.run_id, "summary")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["a%20b", "a?b#c", "ü ä", "it's; +&="])
def test_characters_of_a_path_mean_themselves(tmp_path: Path, folder: str) -> None:
    """The store and its artifacts lie where the storage is, and nowhere else."""
    root = tmp_path / folder
    root.mkdir()
    uri = resolve_tracking_uri(None, str(root))
    tracker, experiment = open_experiment(uri, "x", Storage.at(root))
    log = tracker.run(experiment, "key", "name")
    log.finish({}, texts={"theta.json": "{}"})
    assert Tracker.open(uri).read_theta(f"runs:/{log.run_id}") == ("{}", log.run_id)
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert (root / "mlflow.db").is_file()
    assert (root / f"mlartifacts/{log.run_id}/artifacts/theta.json").is_file()


OPEN = """
import sys
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import open_experiment
sys.stdin.readline()
print(open_experiment(sys.argv[1], "together", Storage.at(sys.argv[2]))[1])
"""


@pytest.mark.slow
def test_three_commands_that_create_one_store_together_succeed(tmp_path: Path) -> None:
    """Each finds the tables of one of them, and the same experiment."""
    command = [sys.executable, "-c", OPEN, f"sqlite:///{tmp_path}/new/mlflow.db", str(tmp_path / "new")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    time.sleep(10)  # until all have imported MLflow
    answers = [process.communicate("\n", timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert {answer[0] for answer in answers} == {"1\n"}


def test_a_store_that_another_command_creates_is_waited_for(monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> None:
    """The lock is that of the file, and its owner is named."""
    spoken, opened = threading.Event(), []
    monkeypatch.setattr(tracking, "note", lambda sentence: spoken.set())
    path = sqlite_path(tracker.uri)
    assert path is not None
    lock = exclusive(Storage.at(path.parent), f".{path.name}.lock", wait=False, announce=lambda sentence: None)
    with lock:
        thread = threading.Thread(target=lambda: opened.append(Tracker.open(tracker.uri)))
        thread.start()
        assert spoken.wait(30)
        assert opened == []
    thread.join(30)
    assert len(opened) == 1


def test_an_experiment_that_another_command_creates_meanwhile_is_used(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found that it does not exist."""
    created = tracker.experiment("meanwhile", None)
    real = tracker.client.get_experiment_by_name
    answers = iter([None])
    monkeypatch.setattr(tracker.client, "get_experiment_by_name", lambda name: next(answers, real(name)))
    assert tracker.experiment("meanwhile", None) == created


def test_mlflows_own_experiment_is_refused(tracker: Tracker) -> None:
    """Its artifacts would go to ./mlruns of the current folder."""
    with pytest.raises(UserError, match=r"experiment name 'Default' is MLflow's own, .*; choose another"):
        tracker.experiment("Default", None)


@pytest.mark.parametrize("alias", ["latest", "v1", "a b"])
def test_an_alias_that_is_refused_leaves_no_version_behind(tracker: Tracker, experiment: str, alias: str) -> None:
    """`models:/NAME/1` would otherwise exist although the command failed."""
    log = tracker.run(experiment, "theta", "theta")
    log.finish({}, texts={THETA_FILE: "{}"})
    name = f"model-{alias.replace(' ', '-')}"
    with pytest.raises(UserError, match=f"theta cannot be registered as '{name}' with alias '{alias}': "):
        tracker.register(name, log.run_id, alias)
    assert tracker.client.search_model_versions(f"name='{name}'") == []
    assert tracker.register(name, log.run_id, "champion") in ("1", "2")
