"""`bespoke doctor` says what is there, what is missing and what to do, and its exit code can be relied on."""

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
from orchestrator.cluster.preflight import Node, NodeReport
from orchestrator.errors import ConfigError, PoolError
from orchestrator.storage import Storage

Examine = Callable[..., tuple[int, dict[str, Finding]]]


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Runs the command without Ray; its exit code, and its findings by name."""
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


def test_a_machine_on_which_sweeps_run_is_called_well(examine: Examine, tmp_path: Path) -> None:
    """Exit code 0: what is optional may be missing, and nothing is left behind."""
    code, found = examine()
    assert code == 0, [finding for finding in found.values() if finding.state == "missing"]
    assert found["torch"].found == metadata.version("torch")
    assert found["local"].found == "starts, and ran a task in 0.1 s"
    assert found[f"{tmp_path}/data"].found == "a folder: a probe was written, read and deleted"
    assert found[f"sqlite:///{tmp_path}/data/mlflow.db"].found == "made by the first sweep"
    assert list((tmp_path / "data").iterdir()) == []
    assert {finding.part for finding in found.values()} == {
        "packages",
        "machine",
        "ray",
        "storage",
        "mlflow",
        "plugins",
    }


def test_every_line_that_is_not_well_says_what_to_do(examine: Examine) -> None:
    """A doctor who only names the illness is of no use."""
    _, found = examine("--storage", "/proc/nowhere", "--tracking-uri", "http://127.0.0.1:9")
    ill = [finding for finding in found.values() if finding.state != "ok"]
    assert {"/proc/nowhere", "http://127.0.0.1:9"} <= {finding.name for finding in ill}
    assert all(finding.found and finding.remedy for finding in ill), ill


def test_a_storage_that_cannot_be_written_is_an_illness(examine: Examine, tmp_path: Path) -> None:
    """A file where a folder is meant: exit code 1, the reason and the remedy."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    code, found = examine("--storage", str(tmp_path / "file"))
    finding = found[f"{tmp_path}/file"]
    assert (code, finding.state, finding.remedy) == (1, "missing", "choose another --storage")
    assert "cannot be written" in finding.found


def test_an_mlflow_that_does_not_answer_is_told_within_seconds(examine: Examine) -> None:
    """A closed port: the client alone would ask again for minutes."""
    code, found = examine("--tracking-uri", "http://127.0.0.1:9")
    finding = found["http://127.0.0.1:9"]
    assert (code, finding.state, finding.remedy) == (1, "missing", "check --tracking-uri")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in finding.found


def test_an_existing_store_is_asked(examine: Examine, tmp_path: Path) -> None:
    """SQLite that is there must be MLflow's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mlflow.db").write_text("this is no database, whatever its name says", encoding="utf-8")
    code, found = examine()
    (finding,) = (finding for finding in found.values() if finding.part == "mlflow")
    assert (code, finding.state) == (1, "missing")
    assert "file is not a database" in finding.found


def test_a_ray_that_does_not_start_is_an_illness(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command runs without it."""

    def refuse(cpus: int) -> float:
        raise PoolError("Ray does not start on this machine: no room in /dev/shm; free some")

    monkeypatch.setattr(preflight, "can_start", refuse)
    code, found = examine()
    assert code == 1
    assert (found["local"].found, found["local"].remedy) == (
        "Ray does not start on this machine: no room in /dev/shm",
        "free some",
    )


def test_a_cluster_is_examined_node_by_node(examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Resources of each node, what each can do, and a SQLite store is not for several of them."""
    there = [Node("a" * 56, "10.0.0.1", {}), Node("b" * 56, "10.0.0.2", {"CPU": 8.0, "GPU": 1.0})]
    asked: list[str | None] = []

    def survey(storage: Storage, tracking_uri: str | None, nodes: list[Node]) -> list[NodeReport]:
        asked.append(tracking_uri)
        return [NodeReport(nodes[0], sees_beacon=True), NodeReport(nodes[1])]

    monkeypatch.setattr("orchestrator.cluster.connect.connect", lambda address, cpus: None)
    monkeypatch.setattr(preflight, "nodes", lambda: there)
    monkeypatch.setattr(preflight, "survey", survey)
    code, found = examine("--address", "10.0.0.1:6379")
    assert code == 1
    assert asked == [None]
    assert found["10.0.0.2 (node bbbbbbbb)"].found == "8 CPU, 1 GPU"
    assert found["10.0.0.1 (node aaaaaaaa)"].found == "nothing"
    assert found["from 10.0.0.1 (node aaaaaaaa)"].state == "ok"
    blind = found["from 10.0.0.2 (node bbbbbbbb)"]
    assert "does not find in it what was just written here" in blind.found
    assert blind.remedy.startswith("give --storage a place that all nodes share, s3://…")
    sqlite = found[f"sqlite:///{tmp_path}/data/mlflow.db"]
    assert "start `mlflow server`" in sqlite.remedy


def test_a_cluster_that_is_not_there_is_told(examine: Examine) -> None:
    """Within seconds, with the remedy."""
    code, found = examine("--address", "127.0.0.1:9")
    assert (code, found["127.0.0.1:9"].state) == (1, "missing")
    assert "no Ray cluster at '127.0.0.1:9'" in found["127.0.0.1:9"].found


def _packages(monkeypatch: pytest.MonkeyPatch, requirements: list[str]) -> dict[str, Finding]:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    about: dict[str, Any] = {"Requires-Python": ">=3.11"}
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: _About(about))
    return {finding.name: finding for finding in doctor.packages()}


class _About(dict[str, Any]):
    def get_all(self, name: str) -> list[str]:
        return ["dev", "audio"]


def test_a_package_that_is_missing_or_too_old_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Required ones are an illness; those of an extra are not, and say which extra brings them."""
    found = _packages(
        monkeypatch,
        ["click>=8", "numpy>=999", "no-such-package>=1", 'no-such-codec; extra == "audio"', 'x; extra == "dev"'],
    )
    assert found["click"].state == "ok"
    assert (found["numpy"].state, found["numpy"].remedy) == ("missing", "pip install 'numpy>=999'")
    assert found["numpy"].found == f"{metadata.version('numpy')}, but >=999 is needed"
    assert (found["no-such-package"].state, found["no-such-package"].found) == ("missing", "not installed")
    codec = found["no-such-codec [audio]"]
    assert (codec.state, codec.remedy) == ("optional", "pip install 'bespoke-solvers[audio]'")
    assert not any(name.startswith("x") for name in found)


def test_every_requirement_of_the_project_is_looked_at() -> None:
    """The list is that of the installed project, not one of the doctor's own."""
    found = {finding.name.split()[0] for finding in doctor.packages()}
    wanted = [Requirement(line) for line in metadata.requires(doctor.PROJECT) or []]
    assert {r.name for r in wanted if r.marker is None} <= found


def test_a_plugin_whose_weights_are_missing_is_told_in_its_own_words(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Optional: only some configurations name it."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    code, found = examine()
    lpips = found["features lpips"]
    assert (code, lpips.state) == (0, "optional")
    assert "alexnet-owt-7be5be79.pth" in lpips.found
    assert "say where it is with the option 'weights'" in lpips.remedy
    assert found["features digits_cnn"].state == "ok"


class _Choosy:
    """A metric that wants captions, or weights."""

    def __init__(self, accepts: tuple[str, ...]):
        self.accepts = accepts

    def check(self, dataset: str) -> None:
        if dataset not in self.accepts:
            raise ConfigError(f"{dataset} has no captions; choose another")


def test_a_metric_lacks_nothing_where_any_dataset_will_do() -> None:
    """That it cannot work with one of them is no missing file; that it works with none probably is."""
    doctor._accepts_any(_Choosy(("prompts",)), {"digits": "digits", "prompts": "prompts"})
    with pytest.raises(ConfigError, match="digits has no captions"):
        doctor._accepts_any(_Choosy(()), {"digits": "digits", "prompts": "prompts"})


def test_a_broken_plugin_does_not_end_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own file that cannot be imported is a line like the others."""

    def load(kind: str, name: str) -> Iterator[Any]:
        raise ImportError(f"no module named {name}_codec")

    monkeypatch.setattr(plugins, "load", load)
    states = {finding.name: finding.state for finding in doctor.plugin_needs()}
    assert states["metrics psnr"] == "optional"


def test_the_table_names_every_finding_once() -> None:
    """For people: the state first, markup in what others wrote taken as it is."""
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
