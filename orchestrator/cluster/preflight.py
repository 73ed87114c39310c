"""What every node of a cluster must be able to do, tried before any work starts: use the storage, reach MLflow.

A path of the driver's machine, or a SQLite file, is not there on the other nodes: hosts and trials on them would fail
one by one, minutes later and far from the cause.
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
"""For all nodes together, which answer at the same time; the first task on a node starts a worker process."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster that this process is connected to."""

    id: str
    address: str
    resources: dict[str, float]

    def __str__(self) -> str:
        return f"{self.address} (node {self.id[:8]})"


@dataclass(frozen=True)
class NodeReport:
    """What one node could do.

    Attributes:
        node: Which one.
        sees_beacon: Whether it found what the driver had written to the storage, byte for byte.
        storage, tracking: What was wrong with either; None: nothing.
        problem: Why the node gave no answer at all; None: it did.
    """

    node: Node
    sees_beacon: bool = False
    storage: str | None = None
    tracking: str | None = None
    problem: str | None = None


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    return [
        Node(entry["NodeID"], entry["NodeManagerAddress"], _countable(entry["Resources"]))
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """CPU, GPU and what a cluster file declares, without what Ray adds for itself."""
    return {name: amount for name, amount in resources.items() if ":" not in name and "memory" not in name}


def survey(storage: Storage, tracking_uri: str | None, there: Sequence[Node]) -> list[NodeReport]:
    """What each of these nodes can do: find what this process writes; write, read and delete; reach MLflow.

    Costs one task without resources on each node, all at the same time.

    Args:
        storage: The root that all of them are to share.
        tracking_uri: The MLflow store; None: not asked.
        there: Nodes, see :func:`nodes`.

    Raises:
        ConfigError: This process cannot use the storage itself.
    """
    storage.check_writable()
    beacon, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    storage.write(beacon, content)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(_from_here)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                storage.root, beacon, hashlib.sha256(content).hexdigest(), tracking_uri
            ): node
            for node in there
        }
        ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        return [_report(node, reference) for reference, node in asked.items()]
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


def _from_here(root: str, beacon: str, sha256: str, tracking_uri: str | None) -> tuple[bool, str | None, str | None]:
    """On a node: (whether it sees the driver's beacon, what is wrong with storage, with MLflow)."""
    sees, storage, tracking = False, None, None
    try:
        there = Storage.at(root)
        sees = there.exists(beacon) and hashlib.sha256(there.read(beacon)).hexdigest() == sha256
        if sees:  # elsewhere a probe would only leave an empty folder behind
            there.check_writable()
    except Exception as error:  # a worker's error may be of a class that the driver cannot unpickle
        storage = str(error) or type(error).__name__
    if tracking_uri is not None:
        try:
            ping(tracking_uri)
        except Exception as error:
            tracking = str(error) or type(error).__name__
    return sees, storage, tracking


def check_nodes(storage: Storage, tracking_uri: str | None, known: Collection[str] = ()) -> set[str]:
    """Refuse storage or MLflow that some node of a cluster cannot use. On a single node nothing is asked.

    Args:
        storage: The experiment's.
        tracking_uri: Its MLflow store; None where the command uses none.
        known: Ids of nodes that have been asked before.

    Returns:
        The ids of all nodes there are: a cluster grows while it is waited for.

    Raises:
        ConfigError: Naming the node, what it cannot do, and the remedy.
        PoolError: A node that gave no answer.
    """
    there = nodes()
    ids = {node.id for node in there}
    if len(there) < 2 or ids <= set(known):
        return ids
    if tracking_uri is not None and tracking_uri.startswith("sqlite:"):
        raise ConfigError(
            f"MLflow's store {tracking_uri} is a file, and the cluster has {len(there)} nodes: SQLite is not safe on a "
            f"shared disk, and not there without one; start `mlflow server` on one node and give its address, e.g. "
            f"--tracking-uri http://head:5000"
        )
    problems = [problem for report in survey(storage, tracking_uri, there) for problem in told(report, storage)]
    if not problems:
        return ids
    first, others = problems[0], len(problems) - 1
    if not others:
        raise first
    more = f" ({others} more such problem(s) on {len(there)} nodes; `bespoke doctor --address …` lists them)"
    raise type(first)(f"{first}{more}")


def told(report: NodeReport, storage: Storage) -> list[ConfigError | PoolError]:
    """What is wrong on one node, as errors with the remedy."""
    if report.problem is not None:
        return [PoolError(f"node {report.node} does not run tasks: {report.problem}; see `ray status`")]
    found: list[ConfigError | PoolError] = []
    if report.storage is not None:
        found.append(ConfigError(f"on node {report.node}: {report.storage}"))
    elif not report.sees_beacon:
        kind = "is a folder of this machine" if storage.is_local else "is another place there"
        found.append(
            ConfigError(
                f"storage root {storage.shown} {kind}: node {report.node} does not find in it what was just written "
                f"here; give --storage a place that all nodes share, s3://…, gs://… or a mounted network folder"
            )
        )
    if report.tracking is not None:
        found.append(ConfigError(f"on node {report.node}: {report.tracking}"))
    return found


def can_start(cpus: int) -> float:
    """Start Ray on this machine, have it run one task, and end it; the seconds of the task.

    Raises:
        PoolError: It does not start.
    """
    ours = not ray.is_initialized()
    try:
        connect(None, cpus)
        begin = time.monotonic()
        ray.get(ray.remote(num_cpus=0)(_nothing).remote(), timeout=NODE_SECONDS)
        return time.monotonic() - begin
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise PoolError(f"Ray does not start on this machine: {error}") from error
    finally:
        if ours:
            ray.shutdown()


def _nothing() -> None:
    pass
