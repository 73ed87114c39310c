"""A sweep on S3, on a server that fails one request in twenty: one run completes it, with pairs as on a directory."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3_server import CREDENTIALS, S3Server

from orchestrator.config.pair_plan import PairKey
from orchestrator.cost import FILE
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import KEY, ROLE, Tracker

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

BESPOKE = Path(sys.executable).with_name("bespoke")


def test_a_sweep_on_storage_that_fails_one_request_in_twenty(
    experiment: dict[str, Any],
    made: Storage,
    specs: dict[PairKey, PairSpec],
    s3_server: S3Server,
    s3_storage: Storage,
    tmp_path: Path,
) -> None:
    """Hosts, trials and the driver all meet failures, and none reaches the user."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    chance, failed = random.Random(0), collections.Counter[str]()

    def fault(request: dict[str, Any]) -> bool:
        failing = chance.random() < 0.05
        failed[request["REQUEST_METHOD"]] += failing
        return failing

    s3_server.requests.clear()
    s3_server.fault = fault
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | CREDENTIALS
    environment["MLFLOW_S3_ENDPOINT_URL"] = f"http://{s3_server.address}"  # for artifacts, which MLflow uploads itself
    done = subprocess.run(
        [BESPOKE, "sweep", "small.yaml", "--storage", s3_storage.root, "--tracking-uri", uri],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    s3_server.fault = None
    assert done.returncode == 0, done.stdout + done.stderr
    assert s3_storage.location("experiments/small/report.html") in done.stdout
    assert "endpoint_override" not in done.stdout
    for spec in specs.values():
        folder = PairStore(made, spec).folder
        names = [
            name for name in s3_storage.names(folder) if not name.startswith("truth-")
        ]  # a sweep's own measurement
        assert names == made.names(folder)
        for name in set(made.names(folder)) - {FILE}:  # durations differ
            assert s3_storage.read(f"{folder}/{name}") == made.read(f"{folder}/{name}"), name
    tracker = Tracker(uri)
    tracked = tracker.client.get_experiment_by_name("small")
    assert tracked is not None
    runs = tracker.client.search_runs([tracked.experiment_id], f"tags.`{ROLE}` = 'trial'")
    keys = [run.data.tags[KEY] for run in runs]
    assert sorted(key.rpartition("/")[2] for key in keys) == s3_storage.names("points")
    assert {run.info.status for run in runs} == {"FINISHED"}
    print(f"{sum(failed.values())} of {len(s3_server.requests)} requests failed: {dict(failed)}")
