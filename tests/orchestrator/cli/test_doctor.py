"""`bespoke doctor` reports what is installed, what is missing and what to do, and its exit code is reliable."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from orchestrator import plugins
from orchestrator.cli import doctor
from orchestrator.cli.doctor import Finding
from orchestrator.cli.main import main
from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import Node, NodeProblem, problems
from orchestrator.errors import ConfigError, PoolError
from orchestrator.storage import Storage

Examine = Callable[..., tuple[int, dict[str, Finding]]]


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """A function that runs the command without Ray and returns its exit code and its findings by name."""
    monkeypatch.setattr(preflight, "can_start", lambda cpus: 0.1)

    def run(*arguments: str) -> tuple[int, dict[str, Finding]]:
        if "--storage" not in arguments:
            arguments = ("--storage", str(tmp_path / "data"), *arguments)
        result = CliRunner().invoke(main, ["doctor", *arguments, "--json"])
        assert result.stderr == ""
        content = json.loads(result.stdout)
        assert content["works"] == (result.exit_code == 0)
        return result.exit_code, {entry["name"]: Finding(**entry) for entry in content["findings"]}

    return run


def test_a_working_machine_passes(examine: Examine, tmp_path: Path) -> None:
    """Exit code 0: optional parts may be missing, and the probes leave no files."""
    code, findings = examine()
    assert code == 0, [finding for finding in findings.values() if finding.state == "missing"]
    assert findings["torch"].found == metadata.version("torch")
    assert findings["local"].found == "starts, and ran a task in 0.1 s"
    assert findings[f"{tmp_path}/data"].found == "a folder: a probe was written, read and deleted"
    assert findings[f"sqlite:///{tmp_path}/data/mlflow.db"].found == "created by the first sweep"
    assert list((tmp_path / "data").iterdir()) == []
    assert {finding.part for finding in findings.values()} == {
        "packages",
        "machine",
        "ray",
        "storage",
        "mlflow",
        "plugins",
    }


def test_every_finding_that_is_not_ok_has_a_remedy(examine: Examine) -> None:
    """Each one says what is wrong and what to do about it."""
    _, findings = examine("--storage", "/proc/nowhere", "--tracking-uri", "http://127.0.0.1:9")
    failed = [finding for finding in findings.values() if finding.state != "ok"]
    assert {"/proc/nowhere", "http://127.0.0.1:9"} <= {finding.name for finding in failed}
    assert all(finding.found and finding.remedy for finding in failed), failed


def test_an_unwritable_storage_is_a_failure(examine: Examine, tmp_path: Path) -> None:
    """A file in place of a folder: exit code 1, the reason and the remedy."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    code, findings = examine("--storage", str(tmp_path / "file"))
    finding = findings[f"{tmp_path}/file"]
    assert (code, finding.state, finding.remedy) == (1, "missing", "choose another --storage")
    assert "cannot be written" in finding.found


def test_an_unreachable_mlflow_is_reported_within_seconds(examine: Examine) -> None:
    """On a closed port, the MLflow client alone would retry for minutes."""
    code, findings = examine("--tracking-uri", "http://127.0.0.1:9")
    finding = findings["http://127.0.0.1:9"]
    assert (code, finding.state, finding.remedy) == (1, "missing", "check --tracking-uri")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in finding.found


def test_an_existing_store_is_opened(examine: Examine, tmp_path: Path) -> None:
    """An existing SQLite file must be a valid MLflow store."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mlflow.db").write_text("this text is not a database, despite its file name", encoding="utf-8")
    code, findings = examine()
    (finding,) = (finding for finding in findings.values() if finding.part == "mlflow")
    assert (code, finding.state) == (1, "missing")
    assert "file is not a database" in finding.found


def test_a_ray_that_does_not_start_is_a_failure(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command runs without Ray."""

    def refuse(cpus: int) -> float:
        raise PoolError("Ray does not start on this machine: no room in /dev/shm; free some")

    monkeypatch.setattr(preflight, "can_start", refuse)
    code, findings = examine()
    assert code == 1
    assert (findings["local"].found, findings["local"].remedy) == (
        "Ray does not start on this machine: no room in /dev/shm",
        "free some",
    )


def test_a_cluster_is_examined_node_by_node(examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Resources of each node, its access to the storage, and that a SQLite store does not work for several nodes."""
    cluster_nodes = [Node("a" * 56, "10.0.0.1", {}), Node("b" * 56, "10.0.0.2", {"CPU": 8.0, "GPU": 1.0})]
    tracking_uris: list[str | None] = []

    def survey(storage: Storage, tracking_uri: str | None, nodes: list[Node]) -> list[tuple[Node, list[NodeProblem]]]:
        tracking_uris.append(tracking_uri)
        return [(nodes[0], []), (nodes[1], problems(nodes[1], (False, None, None), storage))]

    monkeypatch.setattr("orchestrator.cluster.connect.connect", lambda address, cpus: None)
    monkeypatch.setattr(preflight, "nodes", lambda: cluster_nodes)
    monkeypatch.setattr(preflight, "survey", survey)
    code, findings = examine("--address", "10.0.0.1:6379")
    assert code == 1
    assert tracking_uris == [None]
    assert findings["10.0.0.2 (node bbbbbbbb)"].found == "8 CPU, 1 GPU"
    assert findings["10.0.0.1 (node aaaaaaaa)"].found == "nothing"
    assert findings["from 10.0.0.1 (node aaaaaaaa)"].state == "ok"
    unshared = findings["from 10.0.0.2 (node bbbbbbbb)"]
    assert "does not find in it what was just written here" in unshared.found
    assert unshared.remedy.startswith("give --storage a place that all nodes share, s3://…")
    sqlite = findings[f"sqlite:///{tmp_path}/data/mlflow.db"]
    assert "start `mlflow server`" in sqlite.remedy


def test_an_unreachable_cluster_is_reported(examine: Examine) -> None:
    """The command fails within seconds and names the address."""
    code, findings = examine("--address", "127.0.0.1:9")
    assert (code, findings["127.0.0.1:9"].state) == (1, "missing")
    assert "no Ray cluster at '127.0.0.1:9'" in findings["127.0.0.1:9"].found


def _packages(monkeypatch: pytest.MonkeyPatch, requirements: list[str]) -> dict[str, Finding]:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    about: dict[str, Any] = {"Requires-Python": ">=3.11"}
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: _About(about))
    return {finding.name: finding for finding in doctor.packages()}


class _About(dict[str, Any]):
    def get_all(self, name: str) -> list[str]:
        return ["dev", "audio"]


def test_missing_and_outdated_packages_are_reported_with_a_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A required package is a failure. A package of an extra is optional, and the remedy names the extra."""
    findings = _packages(
        monkeypatch,
        ["click>=8", "numpy>=999", "no-such-package>=1", 'no-such-codec; extra == "audio"', 'x; extra == "dev"'],
    )
    assert findings["click"].state == "ok"
    assert (findings["numpy"].state, findings["numpy"].remedy) == ("missing", "pip install 'numpy>=999'")
    assert findings["numpy"].found == f"{metadata.version('numpy')}, but >=999 is needed"
    assert (findings["no-such-package"].state, findings["no-such-package"].found) == ("missing", "not installed")
    codec = findings["no-such-codec [audio]"]
    assert (codec.state, codec.remedy) == ("optional", "pip install 'bespoke-solvers[audio]'")
    assert not any(name.startswith("x") for name in findings)


def test_every_requirement_of_the_project_is_checked() -> None:
    """The list is read from the installed project, not maintained by the doctor."""
    names = {finding.name.split()[0] for finding in doctor.packages()}
    requirements = [Requirement(line) for line in metadata.requires(doctor.PROJECT) or []]
    assert {r.name for r in requirements if r.marker is None} <= names


def test_missing_weights_of_a_plugin_are_reported_in_its_own_words(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are optional, because only some configurations use the plugin."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    code, findings = examine()
    lpips = findings["features lpips"]
    assert (code, lpips.state) == (0, "optional")
    assert "alexnet-owt-7be5be79.pth" in lpips.found
    assert "say where it is with the option 'weights'" in lpips.remedy
    assert findings["features digits_cnn"].state == "ok"


class _SelectiveMetric:
    """A metric that accepts only some datasets."""

    def __init__(self, accepts: tuple[str, ...]):
        self.accepts = accepts

    def check(self, dataset: str) -> None:
        if dataset not in self.accepts:
            raise ConfigError(f"{dataset} has no captions; choose another")


def test_a_metric_passes_if_it_accepts_any_dataset() -> None:
    """Rejecting one dataset does not mean that a file is missing; rejecting all of them probably does."""
    doctor._accepts_any(_SelectiveMetric(("prompts",)), {"digits": "digits", "prompts": "prompts"})
    with pytest.raises(ConfigError, match="digits has no captions"):
        doctor._accepts_any(_SelectiveMetric(()), {"digits": "digits", "prompts": "prompts"})


def test_a_broken_plugin_does_not_stop_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's plugin that cannot be imported is a finding like the others."""

    def load(kind: str, name: str) -> Iterator[Any]:
        raise ImportError(f"no module named {name}_codec")

    monkeypatch.setattr(plugins, "load", load)
    states = {finding.name: finding.state for finding in doctor.plugin_needs()}
    assert states["metrics psnr"] == "optional"


def test_the_table_lists_every_finding_once() -> None:
    """The state comes first, and square brackets in names and messages are printed literally."""
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(
        doctor.table(
            [
                Finding("packages", "torch", "ok", "2.14.1"),
                Finding("packages", "lpips [perceptual]", "optional", "not installed", "pip install it"),
                Finding("storage", "/nowhere", "missing", "[Errno 13] denied", "choose another"),
            ]
        )
    )
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[1:] == [
        ["OK", "packages", "torch", "2.14.1"],
        ["optional", "lpips", "[perceptual]", "not", "installed", "pip", "install", "it"],
        ["MISSING", "storage", "/nowhere", "[Errno", "13]", "denied", "choose", "another"],
    ]
