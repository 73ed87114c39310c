"""A sweep on a cluster of three nodes with an MLflow server: both break while it runs, and it ends all the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_place import EXPERIMENT, PATIENCE, Place, check_complete

from orchestrator.tracking.mlflow import ROLE

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

AWAY = 60
"""Seconds for which MLflow is away."""

NODES = """
import sys
from ray.cluster_utils import Cluster

# Addresses of their own, or a driver could belong to any of them; two cores each, which is bookkeeping.
addresses = iter(f"127.0.0.{number}" for number in range(2, 9))
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
workers = [cluster.add_node(num_cpus=2, node_ip_address=next(addresses)) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "lose":
        cluster.remove_node(workers.pop(0), allow_graceful=False)
    else:
        workers.append(cluster.add_node(num_cpus=2, node_ip_address=next(addresses)))
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A head without cores and two workers, raylets on this machine."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> None:
        """'lose': end the oldest worker, and everything on it, by SIGKILL; 'add': a new one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """They end with the test."""
    started = Nodes()
    yield started
    started.close()


class MLflow:
    """An MLflow server on a place's own store."""

    def __init__(self, place: Place):
        self.place = place
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.place.root.mkdir(exist_ok=True)
        store = f"sqlite:///{self.place.root}/mlflow.db"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", store, "--artifacts-destination", str(self.place.root / "artifacts")),
                *("--workers", "1"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.2)

    def stop(self) -> None:
        """End it by SIGKILL, workers and all."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(place: Place) -> Iterator[MLflow]:
    """An MLflow server while it is needed."""
    server = MLflow(place)
    try:
        yield server
    finally:
        server.stop()


def _wait(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_sweep_outlives_the_loss_of_a_node_and_of_mlflow_for_a_minute(
    undisturbed: Place, nodes: Nodes, tmp_path: Path
) -> None:
    """A worker is lost while pairs are made; another comes; in the sweep the older one is lost, and MLflow is away."""
    place = Place(tmp_path / "cluster", EXPERIMENT)
    with served(place) as server:
        command = ("sweep", "tiny.yaml", "--address", nodes.address, "--tracking-uri", server.uri)
        variables = {
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # half of what MLflow's client has by default
        }
        process = place.start(*command, **variables)
        _wait(lambda: len(place.files("pairs/*/*.parquet")) >= 2, process)
        nodes.tell("lose")
        nodes.tell("add")
        _wait(lambda: any(place.root.glob("points/*/state.json")), process)
        server.stop()
        nodes.tell("lose")
        time.sleep(AWAY)
        server.start()
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
    check_complete(place)
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json", "points/*/theta.json"):
        assert place.files(pattern) == undisturbed.files(pattern)
    (sweep,) = [run for run in place.runs() if run.data.tags[ROLE] == "sweep"]
    assert any(name.startswith("system/") and "cpu" in name for name in sweep.data.metrics), sweep.data.metrics
