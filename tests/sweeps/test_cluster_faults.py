"""A sweep on a cluster of three nodes with an MLflow server completes although nodes and MLflow fail while it runs."""

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
"""Seconds for which MLflow is down."""

NODES = """
import sys
from ray.cluster_utils import Cluster

# Each node has its own address; otherwise a driver could belong to any of them. The cores exist only for Ray.
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
    """A head without cores and two workers, all raylets on this machine."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, command: str) -> None:
        """Send a command: 'lose' kills the oldest worker and its processes by SIGKILL, 'add' adds a worker."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Nodes that end with the test."""
    started = Nodes()
    yield started
    started.close()


class MLflow:
    """An MLflow server on the store of a place."""

    def __init__(self, place: Place):
        self.place = place
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
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
        """Kill the server and its workers by SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(place: Place) -> Iterator[MLflow]:
    """An MLflow server that is stopped at the end of the block."""
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


def test_a_sweep_survives_lost_nodes_and_a_minute_without_mlflow(
    undisturbed: Place, nodes: Nodes, tmp_path: Path
) -> None:
    """A worker is lost while pairs are made and another is added; during the sweep the older one and MLflow go down."""
    place = Place(tmp_path / "cluster", EXPERIMENT)
    with served(place) as server:
        command = ("sweep", "tiny.yaml", "--address", nodes.address, "--tracking-uri", server.uri)
        variables = {
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # half the default of MLflow's client
        }
        process = place.start(*command, **variables)
        _wait(lambda: len(place.files("pairs/*/*.parquet")) >= 2, process)
        nodes.send("lose")
        nodes.send("add")
        _wait(lambda: any(place.root.glob("points/*/state.json")), process)
        server.stop()
        nodes.send("lose")
        time.sleep(AWAY)
        server.start()
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
    check_complete(place)
    for pattern in ("pairs/*/*.parquet", "pairs/*/manifest.json", "points/*/theta.json"):
        assert place.files(pattern) == undisturbed.files(pattern)
    (sweep,) = [run for run in place.runs() if run.data.tags[ROLE] == "sweep"]
    assert any(name.startswith("system/") and "cpu" in name for name in sweep.data.metrics), sweep.data.metrics
