"""`bespoke ui`: the address of the newest sweep's curves, and an end that leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from orchestrator.cli.ui import curves_path
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import ROLE, UPDATED, Tracker, open_experiment
from orchestrator.tracking.uri import resolve_tracking_uri

BESPOKE = Path(sys.executable).with_name("bespoke")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A storage root whose MLflow store holds two sweeps; the experiment 'second' was updated last."""
    uri = resolve_tracking_uri(None, str(tmp_path))
    for name, updated in (("second", "2026-02-01"), ("first", "2026-01-01")):
        tracker, experiment = open_experiment(uri, name, Storage.at(tmp_path))
        tracker.run(experiment, f"sweep/{name}", name, {ROLE: "sweep", UPDATED: updated}).finish({})
    return str(tmp_path)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_experiment_of_the_newest_sweep_is_the_one_updated_last(store: str) -> None:
    """Not the one created last: a repeated sweep continues in its existing run."""
    tracker = Tracker(resolve_tracking_uri(None, store))
    second = tracker.client.get_experiment_by_name("second")
    assert second is not None
    assert tracker.newest_sweep_experiment() == second.experiment_id


def test_a_store_without_sweeps_opens_on_the_start_page(tmp_path: Path) -> None:
    uri = resolve_tracking_uri(None, str(tmp_path))
    tracker, _ = open_experiment(uri, "empty", Storage.at(tmp_path))
    assert tracker.newest_sweep_experiment() is None
    assert curves_path(None) == "/"


def test_the_curves_are_the_chart_view_of_the_experiment() -> None:
    """MLflow 3 would open an experiment on its page of traces."""
    assert curves_path("7") == "/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_server_and_its_workers_end_with_the_command(store: str, sent: signal.Signals, tmp_path: Path) -> None:
    """The address is printed once the server answers; the signal ends every process of the server.

    The server does not import modules that lie in the current folder.
    """
    port = _free_port()
    folder = tmp_path / "current"
    folder.mkdir()
    for name in ("mlflow", "fastapi", "types"):
        (folder / f"{name}.py").write_text("raise RuntimeError('of the current folder')\n")
    command = [BESPOKE, "ui", "--storage", store, "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("curves of the newest sweep"))
        assert f" http://127.0.0.1:{port}/#/experiments/" in line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            assert answer.read() == b"OK"
        children = subprocess.run(["ps", "-o", "pgid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        (group,) = {int(pgid) for pgid in children.stdout.split()}
        process.send_signal(sent)
        assert process.wait(30) == 0
        until = time.monotonic() + 10
        while _group_is_alive(group) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _group_is_alive(group)
    finally:
        process.kill()
        process.wait()
