"""System metrics in MLflow: CPU, memory, disk, network and GPUs of every node, logged to the sweep's run.

Enabled by MLflow's own switch, ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=true``. One actor per node runs MLflow's monitor,
which samples every 10 s or at the interval ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL``. GPUs are included if
nvidia-ml-py is installed.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.preflight import Node, nodes
from orchestrator.tracking.mlflow import monitor_system, wants_system_metrics

STOP_SECONDS = 20.0
"""Time limit for all nodes together to log their remaining samples."""


class SystemMetrics:
    """Context manager that monitors the nodes of the cluster this process is connected to.

    Args:
        tracking_uri: MLflow store.
        run_id: MLflow run to log to. Monitoring ends with the context.
    """

    def __init__(self, tracking_uri: str, run_id: str):
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.watches: dict[str, Any] = {}

    def __enter__(self) -> SystemMetrics:
        self.look()
        return self

    def look(self) -> None:
        """Monitor nodes that have joined since the last call: a cluster may grow during a sweep."""
        if not wants_system_metrics():
            return
        for node in nodes():
            if node.id not in self.watches:
                here = NodeAffinitySchedulingStrategy(node.id, soft=False)
                actor = ray.remote(num_cpus=0)(_Watch).options(scheduling_strategy=here)
                self.watches[node.id] = actor.remote(self.tracking_uri, self.run_id, _name(node))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ends = [watch.finish.remote() for watch in self.watches.values()]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=STOP_SECONDS)
        for watch in self.watches.values():  # including those whose node is lost or does not answer
            ray.kill(watch)
        self.watches.clear()


class _Watch:
    """MLflow's monitor on one node."""

    def __init__(self, tracking_uri: str, run_id: str, node: str):
        self.monitor = monitor_system(tracking_uri, run_id, node)

    def finish(self) -> None:
        """Log the remaining samples and stop."""
        self.monitor.finish()


def _name(node: Node) -> str:
    """Name of a node within metric names. MLflow allows no colons, which IPv6 addresses contain."""
    return node.address.replace(":", "-")
