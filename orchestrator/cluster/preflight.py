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
from orchestrator.tracking.ping import ping

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


Answer = tuple[bool, str | None, str | None]
"""Whether a node read, byte for byte, what the driver wrote; its error with the storage; its error with MLflow."""

NodeProblem = ConfigError | PoolError
"""Why a node cannot take part, as an error that names the node, the reason and the remedy."""


def nodes() -> list[Node]:
    """The live nodes of the cluster that this process is connected to."""
    live = []
    for entry in ray.nodes():
        if entry["Alive"]:  # without the resources that Ray adds to those of the machine and the cluster file
            resources = {n: amount for n, amount in entry["Resources"].items() if ":" not in n and "memory" not in n}
            live.append(Node(entry["NodeID"], entry["NodeManagerAddress"], resources))
    return live


def survey(storage: Storage, tracking_uri: str | None, there: Sequence[Node]) -> list[tuple[Node, list[NodeProblem]]]:
    """Check on each node that it sees files written here, can write, read and delete, and can reach MLflow.

    Runs one task without resources per node, all in parallel.

    Args:
        storage: Storage root that all nodes must share.
        tracking_uri: MLflow store; None to skip this check.
        there: The nodes to check, see :func:`nodes`.

    Returns:
        Each node with its problems; an empty list if all checks passed.

    Raises:
        ConfigError: This process cannot use the storage itself.
    """
    storage.check_writable()
    beacon, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    storage.write(beacon, content)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(_probe_node)
        tasks = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                storage.root, beacon, hashlib.sha256(content).hexdigest(), tracking_uri
            )
            for node in there
        ]
        ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
        return [(node, problems(node, _answer(task), storage)) for node, task in zip(there, tasks, strict=True)]
    finally:
        storage.delete(beacon)


def _answer(task: Any) -> Answer | str:
    """The answer of a node, or the reason why there is none."""
    try:
        answer: Answer = ray.get(task, timeout=0)
        return answer
    except GetTimeoutError:
        ray.cancel(task, force=True)
        return f"no answer within {NODE_SECONDS:g} s"
    except RayError as error:
        return str(error).strip().splitlines()[-1]


def _probe_node(root: str, beacon: str, sha256: str, tracking_uri: str | None) -> Answer:
    """Run on a node."""
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
    errors = [error for _, errors in survey(storage, tracking_uri, current) for error in errors]
    if len(errors) > 1:
        more = f"{len(errors) - 1} more such problem(s) on {len(current)} nodes"
        raise type(errors[0])(f"{errors[0]} ({more}; `bespoke doctor --address …` lists them)")
    if errors:
        raise errors[0]
    return ids


def problems(node: Node, answer: Answer | str, storage: Storage) -> list[NodeProblem]:
    """The problems that a node's answer shows; a text in its place is why there is none."""
    if isinstance(answer, str):
        return [PoolError(f"node {node} does not run tasks: {answer}; see `ray status`")]
    sees_beacon, storage_error, tracking_error = answer
    errors: list[NodeProblem] = [
        ConfigError(f"on node {node}: {error}") for error in (storage_error, tracking_error) if error is not None
    ]
    if not sees_beacon and storage_error is None:
        kind = "is a folder of this machine" if storage.is_local else "is a different place on that node"
        unseen = ConfigError(
            f"storage root {storage.shown} {kind}: node {node} does not find in it what was just written "
            f"here; give --storage a place that all nodes share, s3://…, gs://… or a mounted network folder"
        )
        errors.insert(0, unseen)
    return errors


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
