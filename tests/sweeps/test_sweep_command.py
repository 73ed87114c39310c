"""The ``bespoke sweep`` command: killed at any moment and rerun, it gives the same pairs and solvers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_place import EVALUATE, Place, check_complete, scores

from orchestrator.tracking.mlflow import Tracker
from orchestrator.tracking.uri import resolve_tracking_uri
from solvers.theta import load_theta

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_a_sweep_leaves_pairs_solvers_runs_and_a_report(undisturbed: Place) -> None:
    """An end-to-end sweep; BNS beats its start and every fixed solver."""
    check_complete(undisturbed)
    table = json.loads(undisturbed.run("compare", "tiny", "--json"))
    best = {row["label"] + " " + row["kind"]: row["psnr_db"] for row in table}
    assert best.pop("BNS learned") > max(best.values())
    (learned,) = [row for row in table if row["kind"] == "learned"]
    assert learned["psnr_db"] > learned["start_psnr_db"]
    best_theta = undisturbed.root / "experiments/tiny/thetas/bns-nfe4.json"
    assert best_theta.read_bytes() == Path(learned["theta"]).read_bytes()
    assert load_theta(best_theta).family == "bns"


def test_a_second_sweep_reuses_everything(undisturbed: Place) -> None:
    """It makes no pair, point or run again."""
    before = {**undisturbed.files("pairs/*/*"), **undisturbed.files("points/*/*")}
    times = {path: path.stat().st_mtime_ns for path in undisturbed.root.glob("points/*/*")}
    runs = {run.info.run_id for run in undisturbed.runs()}
    output = undisturbed.run("sweep", "tiny.yaml")
    assert "fixed solvers: 4 of 4 points are complete, reused" in output
    assert "distillation: 1 of 1 points are complete, reused" in output
    assert {**undisturbed.files("pairs/*/*"), **undisturbed.files("points/*/*")} == before
    assert {path: path.stat().st_mtime_ns for path in undisturbed.root.glob("points/*/*")} == times
    assert {run.info.run_id for run in undisturbed.runs()} == runs
    check_complete(undisturbed)


def test_a_sweep_that_is_killed_repeatedly_ends_as_if_undisturbed(undisturbed: Place, tmp_path: Path) -> None:
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
    check_complete(place)
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json", "points/*/theta.json", "points/*/result.json"):
        assert place.files(pattern) == undisturbed.files(pattern)
    leftovers = [path for path in place.root.glob("p*/**/.*") if path.is_file() and path.name != ".lock"]
    assert len(leftovers) <= 6, "at most the objects in flight at each kill: one per host"


def test_a_killed_evaluation_resumes_to_the_same_scores(undisturbed: Place, evaluated: Place, tmp_path: Path) -> None:
    """SIGKILL while ground truth is made, and while solvers are sampled and measured; nothing is lost or duplicated."""
    place = Place(tmp_path / "killed")
    shutil.copytree(undisturbed.root, place.root)

    def measured(at_least: int) -> Callable[[], bool]:
        return lambda: sum(1 for _ in place.root.glob("measurements/*/*/*/shard-*")) >= at_least

    before = len(place.files("pairs/*/*.parquet"))
    place.kill_when(lambda: len(place.files("pairs/*/*.parquet")) > before, *EVALUATE)
    place.kill_when(measured(60), *EVALUATE)
    assert not place.files("experiments/tiny/evaluation/*")
    output = place.run(*EVALUATE)
    assert "| Ground truth (dopri5) |" in output
    assert scores(place) == scores(evaluated)
    assert place.files("measurements/*/*/*/shard-*") == evaluated.files("measurements/*/*/*/shard-*")
    assert not place.files("measurements/media/*/*"), "samples are kept no longer than they are needed"
    # Metrics of a theta are on the run of its trial and on the curve of its solver.
    tracker = Tracker(resolve_tracking_uri(None, str(place.root)))
    runs = tracker.client.search_runs([tracker.experiment("tiny", None)], "params.kind = 'learned'")
    names = {name for run in runs for name in run.data.metrics}
    assert {"labels/psnr_db", "labels/fid/digits_cnn"} <= names
    assert "labels/fid/digits_cnn_vs_nfe" in names
