"""Checks before any work starts that every node of a cluster can use the storage and reach MLflow.

A path on the driver's machine, or a SQLite file, does not exist on the other nodes. Without this check, hosts and
trials on them would fail one by one, minutes later and far from the cause.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.connect import connect
from orchestrator.errors import ConfigError, PoolError
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import ping

NODE_SECONDS = 120.0
"""Timeout for all nodes, which answer in parallel. The first task on a node has to start a worker process."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster that this process is connected to."""

    id: str
    address: str
    resources: dict[str, float]

    def __str__(self) -> str:
        return f"{self.address} (node {self.id[:8]})"


@dataclass(frozen=True)
class NodeReport:
    """Result of the checks on one node.

    Attributes:
        node: The node.
        sees_beacon: Whether the node could read, byte for byte, a file that the driver had written to the storage.
        storage, tracking: Error of the storage or MLflow check; None if it passed.
        problem: Why the node did not answer at all; None if it did.
    """

    node: Node
    sees_beacon: bool = False
    storage: str | None = None
    tracking: str | None = None
    problem: str | None = None


def nodes() -> list[Node]:
    """The live nodes of the cluster that this process is connected to."""
    return [
        Node(entry["NodeID"], entry["NodeManagerAddress"], _countable(entry["Resources"]))
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """CPU, GPU and resources declared in a cluster file, without those that Ray adds."""
    return {name: amount for name, amount in resources.items() if ":" not in name and "memory" not in name}


def survey(storage: Storage, tracking_uri: str | None, there: Sequence[Node]) -> list[NodeReport]:
    """Check on each node that it sees files written here, can write, read and delete, and can reach MLflow.

    Runs one task without resources per node, all in parallel.

    Args:
        storage: Storage root that all nodes must share.
        tracking_uri: MLflow store; None to skip this check.
        there: The nodes to check, see :func:`nodes`.

    Raises:
        ConfigError: This process cannot use the storage itself.
    """
    storage.check_writable()
    beacon, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    storage.write(beacon, content)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(_probe_node)
        tasks = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                storage.root, beacon, hashlib.sha256(content).hexdigest(), tracking_uri
            ): node
            for node in there
        }
        ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_SECONDS)
        return [_report(node, reference) for reference, node in tasks.items()]
    finally:
        storage.delete(beacon)


def _report(node: Node, reference: Any) -> NodeReport:
    try:
        sees, storage, tracking = ray.get(reference, timeout=0)
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        return NodeReport(node, problem=f"no answer within {NODE_SECONDS:g} s")
    except RayError as error:
        return NodeReport(node, problem=str(error).strip().splitlines()[-1])
    return NodeReport(node, sees, storage, tracking)


def _probe_node(root: str, beacon: str, sha256: str, tracking_uri: str | None) -> tuple[bool, str | None, str | None]:
    """Run on a node: (whether it sees the driver's beacon, error of the storage, error of MLflow)."""
    sees, storage, tracking = False, None, None
    try:
        shared = Storage.at(root)
        sees = shared.exists(beacon) and hashlib.sha256(shared.read(beacon)).hexdigest() == sha256
        if sees:  # otherwise a probe would only leave an empty folder behind
            shared.check_writable()
    except Exception as error:  # as text: the driver may be unable to unpickle the error's class
        storage = str(error) or type(error).__name__
    if tracking_uri is not None:
        try:
            ping(tracking_uri)
        except Exception as error:
            tracking = str(error) or type(error).__name__
    return sees, storage, tracking


def check_nodes(storage: Storage, tracking_uri: str | None, known: Collection[str] = ()) -> set[str]:
    """Refuse storage or MLflow that some node of a cluster cannot use. A single node is not checked.

    Args:
        storage: Storage of the experiment.
        tracking_uri: Its MLflow store; None if the command does not use MLflow.
        known: Ids of nodes that were checked before.

    Returns:
        The ids of all current nodes. A cluster may grow, and the check can then be repeated with ``known``.

    Raises:
        ConfigError: A node cannot use one of them. The message names the node, the problem, and the remedy.
        PoolError: A node did not answer.
    """
    current = nodes()
    ids = {node.id for node in current}
    if len(current) < 2 or ids <= set(known):
        return ids
    if tracking_uri is not None and tracking_uri.startswith("sqlite:"):
        raise ConfigError(
            f"MLflow's store {tracking_uri} is a file, and the cluster has {len(current)} nodes: SQLite is not safe on "
            f"a shared disk, and without one the file is missing on the other nodes; start `mlflow server` on one node "
            f"and give its address, e.g. --tracking-uri http://head:5000"
        )
    problems = [problem for report in survey(storage, tracking_uri, current) for problem in errors_of(report, storage)]
    if not problems:
        return ids
    first, others = problems[0], len(problems) - 1
    if not others:
        raise first
    more = f" ({others} more such problem(s) on {len(current)} nodes; `bespoke doctor --address …` lists them)"
    raise type(first)(f"{first}{more}")


def errors_of(report: NodeReport, storage: Storage) -> list[ConfigError | PoolError]:
    """The problems of one node, as errors that name the remedy."""
    if report.problem is not None:
        return [PoolError(f"node {report.node} does not run tasks: {report.problem}; see `ray status`")]
    problems: list[ConfigError | PoolError] = []
    if report.storage is not None:
        problems.append(ConfigError(f"on node {report.node}: {report.storage}"))
    elif not report.sees_beacon:
        kind = "is a folder of this machine" if storage.is_local else "is a different place on that node"
        problems.append(
            ConfigError(
                f"storage root {storage.shown} {kind}: node {report.node} does not find in it what was just written "
                f"here; give --storage a place that all nodes share, s3://…, gs://… or a mounted network folder"
            )
        )
    if report.tracking is not None:
        problems.append(ConfigError(f"on node {report.node}: {report.tracking}"))
    return problems


def can_start(cpus: int) -> float:
    """Start Ray on this machine, run one task, and stop Ray again; returns the duration of the task in seconds.

    Raises:
        PoolError: Ray does not start.
    """
    started_here = not ray.is_initialized()
    try:
        connect(None, cpus)
        begin = time.monotonic()
        ray.get(ray.remote(num_cpus=0)(_nothing).remote(), timeout=NODE_SECONDS)
        return time.monotonic() - begin
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise PoolError(f"Ray does not start on this machine: {error}") from error
    finally:
        if started_here:
            ray.shutdown()


def _nothing() -> None:
    pass
