"""Runs the ``bespoke`` command in a folder of its own, disturbs it, and checks the results."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from orchestrator.tracking.mlflow import KEY, ROLE, Tracker
from orchestrator.tracking.uri import resolve_tracking_uri
from solvers.theta import load_theta

BESPOKE = Path(sys.executable).with_name("bespoke")
PATIENCE = 600
"""Seconds to wait for a command or for the moment to kill it."""

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
    # Tight tolerances and many shards, so that a command can be killed while it makes pairs.
    "pairs": {"train": 64, "validation": 32, "test": 32, "rtol": 1e-8, "atol": 1e-8, "batch_size": 8, "shard_size": 8},
    "nfe": [4],
    "fixed": ["euler", "midpoint"],
    "grid_search": {"p": [1.0, 1.4], "q": [1.0, 1.2], "pairs": 16},
    "learned": [{"family": "bns", "learning_rate": [5e-3], "iterations": 60, "batch_size": 16, "validate_every": 5}],
    "resources": {"hosts": 2, "host_cpus": 0.5, "trial_cpus": 0.25, "local_cpus": 2},
}


class Place:
    """A folder with the experiment's YAML file, in which commands run. Their storage is inside it.

    Args:
        folder: The folder.
        experiment: Content of its ``tiny.yaml``.
        root: Name of the storage root in the folder.
        tracking_uri: MLflow URI; None for the default beside the storage.

    """

    def __init__(
        self,
        folder: Path,
        experiment: dict[str, Any] = EXPERIMENT,
        root: str = "data",
        tracking_uri: str | None = None,
    ):
        self.folder, self.root, self.tracking_uri = folder, folder / root, tracking_uri
        folder.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command on this storage, with additional environment variables."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
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
        """Run a command that must succeed and return its output."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        return output

    def kill_when(self, happened: Callable[[], bool], *command: str) -> None:
        """Start a command and kill it and all its processes by SIGKILL once ``happened`` returns True."""
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
        tracker = Tracker(resolve_tracking_uri(self.tracking_uri, str(self.root)))
        return list(tracker.client.search_runs([tracker.experiment("tiny", None)]))


def check_complete(place: Place) -> None:
    """Check the files and MLflow runs of a completed sweep, whether or not it was disturbed."""
    assert len(place.files("pairs/*/manifest.json")) == 3
    points = {Path(name).parent.name for name in place.files("points/*/result.json")}
    assert len(points) == 2 * 2 + 1
    assert not place.files("points/*/state.json")
    for name in place.files("points/*/theta.json"):
        assert load_theta(place.root / name).solver.nfe == 4
    runs = place.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = [run.data.tags[KEY].rpartition("/")[2] for run in runs if run.data.tags[ROLE] == "trial"]
    assert sorted(trials) == sorted(points), "one run for every point, and no second one"
    assert len([run for run in runs if run.data.tags[ROLE] == "sweep"]) == 1
    assert (place.root / "experiments/tiny/report.html").stat().st_size > 50_000


EVALUATE = (
    *("evaluate", "--experiment", "tiny", "--config", "tiny.yaml"),
    *("--set", "evaluation.samples=192", "--set", "evaluation.baselines=[euler, midpoint]"),
    *("--set", "evaluation.metrics=[psnr, {name: fid, options: {features: digits_cnn, reference: digits}}]"),
)


def scores(place: Place) -> list[dict[str, Any]]:
    rows = pq.read_table(place.root / "experiments/tiny/evaluation/scores.parquet").to_pylist()
    return [{key: str(row[key]) for key in row if key != "origin"} for row in rows]
