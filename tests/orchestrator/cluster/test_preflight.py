"""Preflight checks: every node must be able to use the storage and MLflow before any work starts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import Answer, Node, NodeProblem, check_nodes, problems
from orchestrator.errors import ConfigError, PoolError, UserError
from orchestrator.storage import Storage

HEAD, WORKER = Node("a" * 56, "10.0.0.1", {}), Node("b" * 56, "10.0.0.2", {"CPU": 8.0})
SERVER = "http://head:5000"
HEALTHY: Answer = (True, None, None)

Cluster = Callable[..., list[Sequence[Node]]]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A function that simulates a cluster of a healthy head and workers with these answers; returns its surveys."""

    def pretend(*answers: Answer | str) -> list[Sequence[Node]]:
        surveys: list[Sequence[Node]] = []
        machines = [HEAD] + [WORKER] * len(answers)

        def survey(
            storage: Storage, tracking_uri: str | None, there: Sequence[Node]
        ) -> list[tuple[Node, list[NodeProblem]]]:
            surveys.append(there)
            return [
                (node, problems(node, answer, storage)) for node, answer in zip(there, (HEALTHY, *answers), strict=True)
            ]

        monkeypatch.setattr(preflight, "nodes", lambda: machines)
        monkeypatch.setattr(preflight, "survey", survey)
        return surveys

    return pretend


def test_a_single_node_is_not_surveyed(cluster: Cluster, storage: Storage) -> None:
    """A laptop's folder and SQLite store work there, and the check takes no time."""
    surveys = cluster()
    assert check_nodes(storage, "sqlite:////data/mlflow.db") == {HEAD.id}
    assert surveys == []


def test_healthy_nodes_are_surveyed_once(cluster: Cluster, storage: Storage) -> None:
    """The survey is repeated only if the cluster has grown."""
    surveys = cluster(HEALTHY)
    known = check_nodes(storage, SERVER)
    assert known == {HEAD.id, WORKER.id}
    check_nodes(storage, SERVER, known)
    assert len(surveys) == 1
    check_nodes(storage, SERVER, {HEAD.id})
    assert len(surveys) == 2


def test_a_sqlite_store_is_refused_on_more_than_one_node(cluster: Cluster, storage: Storage) -> None:
    """Even on a shared disk, because SQLite is not safe there."""
    surveys = cluster(HEALTHY)
    with pytest.raises(
        ConfigError,
        match=r"store sqlite:////shared/mlflow\.db is a file, and the cluster has 2 nodes: .*start `mlflow server` on "
        r"one node and give its address, e\.g\. --tracking-uri http://head:5000",
    ):
        check_nodes(storage, "sqlite:////shared/mlflow.db")
    assert surveys == []
    check_nodes(storage, None)  # making pairs alone does not use MLflow


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            (False, None, None),
            ConfigError,
            r"storage root .* is a folder of this machine: node 10\.0\.0\.2 \(node bbbbbbbb\) does not find in it what "
            r"was just written here; give --storage a place that all nodes share, s3://…, gs://… or a mounted",
        ),
        (
            (False, "storage root s3://bucket cannot be written: denied; choose another --storage", None),
            ConfigError,
            r"on node 10\.0\.0\.2 \(node bbbbbbbb\): storage root s3://bucket cannot be written: denied; choose",
        ),
        (
            (True, None, "MLflow at http://head:5000 cannot be used: refused; check"),
            ConfigError,
            r"on node 10\.0\.0\.2 \(node bbbbbbbb\): MLflow at http://head:5000 cannot be used: refused; check",
        ),
        (
            "no answer within 120 s",
            PoolError,
            r"node 10\.0\.0\.2 \(node bbbbbbbb\) does not run tasks: no answer within 120 s; see `ray status`",
        ),
    ],
    ids=["a folder of the driver's", "storage", "MLflow", "silent"],
)
def test_a_failing_node_is_refused_with_its_name_and_the_remedy(
    cluster: Cluster, storage: Storage, answer: Answer | str, kind: type[UserError], message: str
) -> None:
    """Before any work starts, not when the node gets its first shard."""
    cluster(answer)
    with pytest.raises(kind, match=message):
        check_nodes(storage, SERVER)


def test_the_first_of_many_problems_is_reported_and_the_others_are_counted(cluster: Cluster, storage: Storage) -> None:
    """Sixty nodes without the folder give one message, and the command that lists them all."""
    cluster(*[(False, None, "MLflow cannot be used; check --tracking-uri")] * 3)
    with pytest.raises(
        ConfigError, match=r"\(5 more such problem\(s\) on 4 nodes; `bespoke doctor --address …` lists them\)"
    ):
        check_nodes(storage, SERVER)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_node_that_sees_the_beacon_probes_the_storage_and_leaves_no_files(storage: Storage) -> None:
    """The storage is shared, so the node writes, reads and deletes a probe of its own."""
    storage.write("beacon", b"light")
    assert preflight._probe_node(storage.root, "beacon", _sha256(b"light"), None) == (True, None, None)
    assert [path.name for path in Path(storage.root).iterdir()] == ["beacon"]


def test_a_node_that_does_not_see_the_beacon_writes_nothing(storage: Storage) -> None:
    """The path is on the node's own disk: no folder is created, and a file with other content is not the beacon."""
    assert preflight._probe_node(storage.root, "beacon", _sha256(b"light"), None) == (False, None, None)
    assert not Path(storage.root).exists()
    storage.write("beacon", b"dark")
    assert preflight._probe_node(storage.root, "beacon", _sha256(b"light"), None) == (False, None, None)


def test_errors_on_a_node_are_returned_as_text(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of an error may be missing on the driver, or may not be picklable."""
    monkeypatch.setattr(Storage, "exists", lambda self, key: 1 // 0)
    sees, problem, tracking = preflight._probe_node(storage.root, "beacon", "", "http://127.0.0.1:9")
    assert (sees, problem) == (False, "integer division or modulo by zero")
    assert tracking is not None
    assert "MLflow at http://127.0.0.1:9 cannot be used" in tracking


# ---- Ray ----------------------------------------------------------------------------------------------------------

TWO_NODES = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster

from orchestrator.errors import UserError
from orchestrator.cluster.preflight import check_nodes, nodes, survey
from orchestrator.storage import Storage

shared, first, second = sys.argv[1:]
os.chdir(first)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.chdir(second)  # the second node's processes work in another folder
cluster.add_node(num_cpus=1)
os.chdir(first)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
results = {"nodes": len(nodes())}


def attempt(name, root, tracking_uri=None):
    try:
        check_nodes(Storage(root), tracking_uri)
        results[name] = None
    except UserError as error:
        results[name] = str(error)


attempt("shared", shared)
attempt("own", "/proc/self/cwd/data")  # the same path, but a different folder on each node
attempt("mlflow", shared, "http://127.0.0.1:9")
attempt("sqlite", shared, f"sqlite:///{shared}/mlflow.db")
both = survey(Storage(shared), None, nodes())
results["both"] = [len(problems) for _, problems in both]
results["left"] = os.listdir(shared)
print(json.dumps(results))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_two_real_nodes_share_a_folder_or_are_refused(tmp_path: Path) -> None:
    """Two raylets: a folder visible to both is accepted; a path that is a different folder on each is refused."""
    folders = [tmp_path / name for name in ("shared", "first", "second")]
    for folder in folders:
        folder.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", TWO_NODES, *map(str, folders)], capture_output=True, text=True, timeout=200, check=False
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert results["nodes"] == 2
    assert results["shared"] is None
    assert results["both"] == [0, 0]
    assert "/proc/self/cwd/data is a folder of this machine: node " in results["own"]
    assert "MLflow at http://127.0.0.1:9 cannot be used" in results["mlflow"]
    assert "(1 more such problem(s) on 2 nodes" in results["mlflow"]
    assert "is a file, and the cluster has 2 nodes" in results["sqlite"]
    assert results["left"] == []
    assert [path.name for path in (tmp_path / "second").iterdir()] == []
