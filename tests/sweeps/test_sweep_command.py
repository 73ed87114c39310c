"""`bespoke sweep` as users run it: killed at any moment and started again, it ends with the same pairs and solvers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator.config import resolve_tracking_uri
from orchestrator.tracking import KEY, ROLE, Tracker
from solvers.ns import ThetaArtifact

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

BESPOKE = Path(sys.executable).with_name("bespoke")
PATIENCE = 600
"""Seconds after which a command that does not come to its point is given up."""

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
    # Tight, and in many shards, so that making pairs has a middle to be killed in.
    "pairs": {"train": 64, "validation": 32, "test": 32, "rtol": 1e-8, "atol": 1e-8, "batch_size": 8, "shard_size": 8},
    "nfe": [4],
    "fixed": ["euler", "midpoint"],
    "grid_search": {"p": [1.0, 1.4], "q": [1.0, 1.2], "pairs": 16},
    "learned": [{"family": "bns", "learning_rate": [5e-3], "iterations": 60, "batch_size": 16, "validate_every": 5}],
    "resources": {"hosts": 2, "host_cpus": 0.5, "trial_cpus": 0.25, "local_cpus": 2},
}


class Place:
    """A folder with the experiment's file, in which commands are run."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "data"
        folder.mkdir()
        (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")

    def start(self, *command: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            [BESPOKE, *command, "--storage", str(self.root)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        """The output of a command that must succeed."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        return output

    def kill_when(self, happened: Callable[[], bool], *command: str) -> None:
        """Starts a command and ends it, with all it started, by SIGKILL once something has happened."""
        process = self.start(*command)
        try:
            end = time.monotonic() + PATIENCE
            while not happened():
                assert process.poll() is None, f"it ended first: {process.communicate()[0]}"
                assert time.monotonic() < end
                time.sleep(0.002)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def files(self, pattern: str) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in sorted(self.root.glob(pattern))}

    def runs(self) -> list[Any]:
        tracker = Tracker(resolve_tracking_uri(None, str(self.root)))
        return list(tracker.client.search_runs([tracker.experiment("tiny", None)]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A sweep that nobody disturbed."""
    place = Place(tmp_path_factory.mktemp("sweep") / "undisturbed")
    output = place.run("sweep", "tiny.yaml")
    assert f"report: {place.root}/experiments/tiny/report.html" in output
    assert "start of BNS" in output
    return place


def _complete(place: Place) -> None:
    """What a sweep leaves, whatever happened on the way."""
    assert len(place.files("pairs/*/manifest.json")) == 3
    points = {Path(name).parent.name for name in place.files("points/*/result.json")}
    assert len(points) == 2 * 2 + 1
    assert not place.files("points/*/state.json")
    for name in place.files("points/*/theta.json"):
        assert ThetaArtifact.load(place.root / name).solver.nfe == 4
    runs = place.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = [run.data.tags[KEY].rpartition("/")[2] for run in runs if run.data.tags[ROLE] == "trial"]
    assert sorted(trials) == sorted(points), "one run for every point, and no second one"
    assert len([run for run in runs if run.data.tags[ROLE] == "sweep"]) == 1
    assert (place.root / "experiments/tiny/report.html").stat().st_size > 50_000


def test_a_sweep_leaves_pairs_solvers_runs_and_a_report(undisturbed: Place) -> None:
    """The main job, end to end; BNS beats what it started from, and every fixed solver."""
    _complete(undisturbed)
    table = json.loads(undisturbed.run("compare", "tiny", "--json"))
    best = {row["label"] + " " + row["kind"]: row["psnr_db"] for row in table}
    assert best.pop("BNS learned") > max(best.values())
    (learned,) = [row for row in table if row["kind"] == "learned"]
    assert learned["psnr_db"] > learned["start_psnr_db"]
    best_theta = undisturbed.root / "experiments/tiny/thetas/bns-nfe4.json"
    assert best_theta.read_bytes() == Path(learned["theta"]).read_bytes()
    assert ThetaArtifact.load(best_theta).family == "bns"


def test_a_second_sweep_reuses_everything_and_says_the_same(undisturbed: Place) -> None:
    """No pair, no point and no run is made again."""
    before = {**undisturbed.files("pairs/*/*"), **undisturbed.files("points/*/*")}
    times = {path: path.stat().st_mtime_ns for path in undisturbed.root.glob("points/*/*")}
    runs = {run.info.run_id for run in undisturbed.runs()}
    output = undisturbed.run("sweep", "tiny.yaml")
    assert "fixed solvers: 4 of 4 points are complete, reused" in output
    assert "distillation: 1 of 1 points are complete, reused" in output
    assert {**undisturbed.files("pairs/*/*"), **undisturbed.files("points/*/*")} == before
    assert {path: path.stat().st_mtime_ns for path in undisturbed.root.glob("points/*/*")} == times
    assert {run.info.run_id for run in undisturbed.runs()} == runs
    _complete(undisturbed)


def test_a_sweep_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    undisturbed: Place, tmp_path: Path
) -> None:
    """SIGKILL while pairs are made, while fixed solvers are searched, and while theta is distilled."""
    place = Place(tmp_path / "killed")
    sweep = ("sweep", "tiny.yaml")
    place.kill_when(lambda: any(place.root.glob("pairs/*/*.parquet")), *sweep)
    assert len(place.files("pairs/*/manifest.json")) < 3
    place.kill_when(lambda: any(place.root.glob("points/*/result.json")), *sweep)
    assert not place.files("experiments/tiny/report.html")
    place.kill_when(lambda: any(place.root.glob("points/*/state.json")), *sweep)
    assert len(place.files("points/*/result.json")) < 5
    place.run(*sweep)
    _complete(place)
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json", "points/*/theta.json", "points/*/result.json"):
        assert place.files(pattern) == undisturbed.files(pattern)
    leftovers = [path for path in place.root.glob("p*/**/.*") if path.is_file() and path.name != ".lock"]
    assert len(leftovers) <= 6, "at most the objects in flight at each kill: one a host"


EVALUATE = (
    *("evaluate", "--experiment", "tiny", "--config", "tiny.yaml"),
    *("--set", "evaluation.samples=192", "--set", "evaluation.baselines=[euler, midpoint]"),
    *("--set", "evaluation.metrics=[psnr, {name: fid, options: {features: digits_cnn, reference: digits}}]"),
)


def _scores(place: Place) -> list[dict[str, Any]]:
    rows = pq.read_table(place.root / "experiments/tiny/evaluation/scores.parquet").to_pylist()
    return [{key: str(row[key]) for key in row if key != "origin"} for row in rows]


def test_an_evaluation_that_is_killed_goes_on_to_the_same_scores(undisturbed: Place, tmp_path: Path) -> None:
    """SIGKILL while ground truth is made, and while solvers are sampled and scored: nothing is lost or doubled."""
    place = Place(tmp_path / "killed")
    shutil.copytree(undisturbed.root, place.root)
    undisturbed.run(*EVALUATE)

    def measured(at_least: int) -> Callable[[], bool]:
        return lambda: sum(1 for _ in place.root.glob("measurements/*/*/*/shard-*")) >= at_least

    before = len(place.files("pairs/*/*.parquet"))
    place.kill_when(lambda: len(place.files("pairs/*/*.parquet")) > before, *EVALUATE)
    place.kill_when(measured(60), *EVALUATE)
    assert not place.files("experiments/tiny/evaluation/*")
    output = place.run(*EVALUATE)
    assert "| Ground truth (dopri5) |" in output
    assert _scores(place) == _scores(undisturbed)
    assert place.files("measurements/*/*/*/shard-*") == undisturbed.files("measurements/*/*/*/shard-*")
    assert not place.files("measurements/media/*/*"), "samples are kept no longer than they are needed"
    # Numbers of a theta are on the run of the trial that found it, and on its solver's curve.
    tracker = Tracker(resolve_tracking_uri(None, str(place.root)))
    found = tracker.client.search_runs([tracker.experiment("tiny", None)], "params.kind = 'learned'")
    names = {name for run in found for name in run.data.metrics}
    assert {"labels/psnr_db", "labels/fid/digits_cnn"} <= names
    assert "labels/fid/digits_cnn_vs_nfe" in names
