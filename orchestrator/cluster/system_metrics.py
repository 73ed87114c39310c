"""The machines' own numbers in MLflow: CPU, memory, disk, network and GPUs of every node, on the sweep's run.

Only where MLflow's own switch asks for them, ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=true``. They are then sampled by
MLflow's own monitor, one actor a node, every 10 s or as ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` says. GPUs are seen
where nvidia-ml-py is installed.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.preflight import Node, nodes
from orchestrator.tracking.mlflow import monitor_system, wants_system_metrics

STOP_SECONDS = 20.0
"""For all nodes together, to log what they have sampled."""


class SystemMetrics:
    """Watches the nodes of the cluster that this process is connected to; a context manager.

    Args:
        tracking_uri: MLflow.
        run_id: The run that is logged to; watching ends with it.
    """

    def __init__(self, tracking_uri: str, run_id: str):
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.watches: dict[str, Any] = {}

    def __enter__(self) -> SystemMetrics:
        self.look()
        return self

    def look(self) -> None:
        """Watch the nodes that have come since the last look: a cluster grows while it works."""
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
        for watch in self.watches.values():  # also those whose node is gone, or does not answer
            ray.kill(watch)
        self.watches.clear()


class _Watch:
    """MLflow's monitor on one node."""

    def __init__(self, tracking_uri: str, run_id: str, node: str):
        self.monitor = monitor_system(tracking_uri, run_id, node)

    def finish(self) -> None:
        """Log what has been sampled and end."""
        self.monitor.finish()


def _name(node: Node) -> str:
    """A node as part of a metric's name: MLflow takes no colons, which addresses of version 6 have."""
    return node.address.replace(":", "-")
