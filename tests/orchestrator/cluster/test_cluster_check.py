"""Checks of the cluster file: the shipped file passes, and each kind of mistake is reported."""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli.main import main
from orchestrator.cluster.check import PLACEHOLDER, Problem, check_cluster_file
from orchestrator.config.sections import Resources

pytest.importorskip("ray.autoscaler", reason="the cluster file is checked with Ray's own validation")

REPOSITORY = Path(__file__).resolve().parents[3]
SHIPPED = REPOSITORY / "ray_cluster.yaml"
RAY = metadata.version("ray")

Cluster = dict[str, Any]
Edit = Callable[[Cluster], None]


@pytest.fixture(scope="module")
def shipped() -> Cluster:
    loaded: Cluster = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def problems_after(shipped: Cluster, tmp_path: Path) -> Callable[..., list[Problem]]:
    """A function that edits a copy of the shipped file and returns the problems of the copy."""

    def check(edit: Edit, constraints: str | None = None, **options: Any) -> list[Problem]:
        cluster = copy.deepcopy(shipped)
        edit(cluster)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(cluster), encoding="utf-8")
        if constraints is not None:
            (tmp_path / "constraints.txt").write_text(constraints, encoding="utf-8")
        return check_cluster_file(path, **options)

    return check


def put(*keys: Any, value: Any) -> Edit:
    def edit(cluster: Cluster) -> None:
        inner: Any = cluster
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return edit


def drop(*keys: Any) -> Edit:
    def edit(cluster: Cluster) -> None:
        inner: Any = cluster
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return edit


def replace(section: str, old: str, new: str) -> Edit:
    """Return an edit that replaces text in the commands of a section and fails if the text is absent."""

    def edit(cluster: Cluster) -> None:
        before = cluster[section]
        cluster[section] = [command.replace(old, new) for command in before]
        assert cluster[section] != before, f"{old!r} is not in {section}"

    return edit


def both(*edits: Edit) -> Edit:
    def edit(cluster: Cluster) -> None:
        for each in edits:
            each(cluster)

    return edit


def test_shipped_file_has_no_problems() -> None:
    assert [str(problem) for problem in check_cluster_file(SHIPPED)] == []


def test_shipped_file_matches_the_guide(shipped: Cluster) -> None:
    types = shipped["available_node_types"]
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["gpu_on_demand"]["node_config"]
    assert types["gpu_spot"]["node_config"]["InstanceType"] == types["gpu_on_demand"]["node_config"]["InstanceType"]
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"].get("priority", 0)
    assert re.findall(r"EDIT (\d) of 4", SHIPPED.read_text(encoding="utf-8")) == ["1", "2", "3", "4"]


def test_shipped_file_mounts_exist(shipped: Cluster) -> None:
    sources = [source for source in shipped["file_mounts"].values() if not source.startswith("~")]
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="Ray runs the commands with bash")
def test_shipped_commands_are_shell(shipped: Cluster) -> None:
    # Ray puts each command into parentheses, which a comment inside it would leave open.
    commands = [command for key, listed in shipped.items() if key.endswith("_commands") for command in listed]
    script = "\n".join(f"({command})" for command in commands)
    parsed = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")


MISTAKES: dict[str, tuple[Edit, str, str]] = {
    "misspelt top-level key": (
        both(put("max_worker", value=10), drop("max_workers")),
        "top level: Additional properties are not allowed ('max_worker' was unexpected)",
        "Did you mean max_workers?",
    ),
    "misspelt key of a node type": (
        put("available_node_types", "gpu_spot", "max_worker", value=6),
        "available_node_types.gpu_spot: Additional properties are not allowed ('max_worker' was unexpected)",
        "Did you mean max_workers?",
    ),
    "wrong type": (
        put("idle_timeout_minutes", value="ten"),
        "idle_timeout_minutes: 'ten' is not of type 'number'",
        "Give it a value of type number",
    ),
    "missing resources": (
        drop("available_node_types", "cpu", "resources"),
        "available_node_types.cpu: 'resources' is a required property",
        "Add the missing key",
    ),
    "no provider": (drop("provider"), "Ray's validation: the key 'provider' is missing", "Compare the file with"),
    "sum of minima above the limit": (
        both(
            put("available_node_types", "gpu_spot", "min_workers", value=6),
            put("available_node_types", "gpu_on_demand", "max_workers", value=9),
            put("available_node_types", "gpu_on_demand", "min_workers", value=9),
        ),
        "The specified global `max_workers` is smaller than the sum of `min_workers`",
        "Change the file accordingly",
    ),
    "unknown head type": (
        put("head_node_type", value="haed"),
        "head_node_type: the head's type is 'haed', which is not a node type",
        "Name one of available_node_types: ['",
    ),
    "no head type": (drop("head_node_type"), "head_node_type: the head's type is missing", "Name one of"),
    "minimum above maximum": (
        put("available_node_types", "gpu_spot", "min_workers", value=7),
        "available_node_types.gpu_spot: min_workers 7 exceeds max_workers 6",
        "Raise max_workers or lower min_workers",
    ),
    "maximum above the limit": (
        put("available_node_types", "gpu_spot", "max_workers", value=12),
        "available_node_types.gpu_spot: max_workers 12 exceeds the whole cluster's max_workers 10",
        "Lower it to 10 or raise the top-level max_workers",
    ),
    "limit never reached": (
        put("max_workers", value=40),
        "max_workers: the worker types allow 10 workers together, fewer than the cluster's max_workers 40",
        "Lower it to 10",
    ),
    "head with CPUs": (
        put("available_node_types", "head", "resources", value={"CPU": 8}),
        "available_node_types.head.resources: the head advertises CPU 8",
        "Declare CPU: 0",
    ),
    "head without a number of CPUs": (
        put("available_node_types", "head", "resources", value={}),
        "available_node_types.head.resources: the head does not declare CPU",
        "Declare CPU: 0",
    ),
    "GPU instance without GPU": (
        put("available_node_types", "gpu_spot", "resources", value={"CPU": 8}),
        "available_node_types.gpu_spot.resources: g5.2xlarge has a GPU, but the resources are {'CPU': 8}",
        "Declare GPU as well",
    ),
    "GPU on an instance without one": (
        put("available_node_types", "cpu", "resources", value={"CPU": 8, "GPU": 1}),
        "available_node_types.cpu.resources: GPU 1 is declared, but m6i.2xlarge has none",
        "Choose a p or g instance type",
    ),
    "no GPU type": (
        both(
            drop("available_node_types", "gpu_spot"),
            drop("available_node_types", "gpu_on_demand"),
            put("max_workers", value=2),
        ),
        "available_node_types: no worker type declares a GPU",
        "Add a worker type with GPU",
    ),
    "no idle timeout": (drop("idle_timeout_minutes"), "idle_timeout_minutes: it is not set", "Set it"),
    "unpinned Ray": (
        replace("setup_commands", f"]=={RAY}'", "]'"),
        "setup_commands: 'ray[default,tune]' does not pin one version of Ray",
        f"Write ray[default]=={RAY}",
    ),
    "Ray with a lower bound": (
        replace("setup_commands", f"=={RAY}", f">={RAY}"),
        f"setup_commands: 'ray[default,tune]>={RAY}' does not pin one version of Ray",
        f"Write ray[default]=={RAY}",
    ),
    "nightly Ray": (
        replace("setup_commands", f"=={RAY}'", " @ https://example.org/ray-3.0.0.dev0-cp311.whl'"),
        "does not pin one version of Ray",
        f"Write ray[default]=={RAY}",
    ),
    "another Ray": (
        replace("setup_commands", f"=={RAY}", "==2.9.3"),
        f"setup_commands: the nodes install Ray 2.9.3, but Ray {RAY} is installed here",
        "Use one version",
    ),
    "bare Ray": (
        replace("setup_commands", "ray[default,tune]", "ray"),
        "lacks the extra `default`, without which there is no dashboard and no jobs API",
        f"Write ray[default]=={RAY}",
    ),
    "Ray not named": (
        replace("setup_commands", f"'ray[default,tune]=={RAY}' ", ""),
        "worker_setup_commands: nothing pins the version of Ray",
        f"Install ray[default]=={RAY}",
    ),
    "a type with setup commands of its own": (
        put("available_node_types", "cpu", "worker_setup_commands", value=["true"]),
        "available_node_types.cpu.worker_setup_commands: nothing pins the version of Ray",
        f"Install ray[default]=={RAY}",
    ),
    "no setup commands": (
        drop("setup_commands"),
        "setup_commands: they are missing, so Ray's defaults would install a nightly build",
        f"Install ray[default]=={RAY}",
    ),
    "public dashboard": (
        replace("head_start_ray_commands", "--dashboard-host=127.0.0.1", "--dashboard-host 0.0.0.0"),
        "head_start_ray_commands: the dashboard, which runs the jobs it is sent, listens on 0.0.0.0",
        "Use --dashboard-host=127.0.0.1",
    ),
    "Ray's own head commands": (
        drop("head_start_ray_commands"),
        "head_start_ray_commands: the dashboard, which runs the jobs it is sent, listens on 0.0.0.0",
        "Use --dashboard-host=127.0.0.1",
    ),
    "no autoscaling": (
        replace("head_start_ray_commands", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "head_start_ray_commands: `ray start` is not given --autoscaling-config",
        "Add --autoscaling-config",
    ),
    "Ray not started": (
        put("worker_start_ray_commands", value=["ray stop"]),
        "worker_start_ray_commands: no command runs `ray start`",
        "Take the commands of ray_cluster.yaml",
    ),
    "head without token mode": (
        both(
            replace("head_start_ray_commands", "RAY_AUTH_MODE=token", ""),
            replace("setup_commands", "RAY_AUTH_MODE=token", ""),
        ),
        "head_start_ray_commands: Ray is started without RAY_AUTH_MODE=token",
        "Write RAY_AUTH_MODE=token ray start",
    ),
    "workers without token mode": (
        both(
            replace("worker_start_ray_commands", "RAY_AUTH_MODE=token", ""),
            replace("setup_commands", "RAY_AUTH_MODE=token", ""),
        ),
        "worker_start_ray_commands: Ray is started without RAY_AUTH_MODE=token",
        "Write RAY_AUTH_MODE=token ray start",
    ),
    "token mode exported in another shell": (
        both(
            replace("worker_start_ray_commands", "RAY_AUTH_MODE=token", ""),
            replace("worker_start_ray_commands", "ray stop", "export RAY_AUTH_MODE=token; ray stop"),
            replace("setup_commands", "RAY_AUTH_MODE=token", ""),
        ),
        "worker_start_ray_commands: Ray is started without RAY_AUTH_MODE=token",
        "an export in a separate command has no effect",
    ),
    "token mode switched off": (
        replace("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "worker_start_ray_commands: Ray is started without RAY_AUTH_MODE=token",
        "Write RAY_AUTH_MODE=token ray start",
    ),
    "token not mounted": (
        drop("file_mounts", "~/.ray/auth_token"),
        "file_mounts: the token file is not copied to the nodes",
        "Add ~/.ray/auth_token",
    ),
    "token in the file": (
        replace("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123abcd"),
        "worker_start_ray_commands: a command sets RAY_AUTH_TOKEN",
        "Mount the token as a file",
    ),
    "public MLflow": (
        replace("head_start_ray_commands", "--host bespoke-head", "--host 0.0.0.0"),
        "head_start_ray_commands: the MLflow server, which requires no password, listens on 0.0.0.0",
        "Bind it to the head's private address",
    ),
    "MLflow under any name": (
        replace("head_start_ray_commands", "--allowed-hosts bespoke-head:5000,localhost:5000,127.0.0.1:5000", ""),
        "head_start_ray_commands: the MLflow server listens on bespoke-head without --allowed-hosts",
        "List the names it is reached by",
    ),
}


@pytest.mark.parametrize(("edit", "what", "remedy"), MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_is_reported(
    problems_after: Callable[..., list[Problem]], edit: Edit, what: str, remedy: str
) -> None:
    lines = [str(problem) for problem in problems_after(edit)]
    assert any(what in line and remedy in line for line in lines), "\n".join(lines) or "no problem was reported"


@pytest.mark.parametrize(
    "edit",
    [
        # Setting the mode in the profile is enough, because every Ray command reads it.
        replace("worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
        # Ray's default dashboard host is the loopback address.
        replace("head_start_ray_commands", "--dashboard-host=127.0.0.1", ""),
        # A limit below the sum of the types' maxima is a budget shared between them.
        put("max_workers", value=8),
        # Neither the argument of another option nor a package such as x-ray names Ray.
        replace("setup_commands", "-c constraints.txt", "-c constraints.txt --find-links ~/ray/wheels x-ray==1"),
    ],
)
def test_allowed_variations_are_not_reported(problems_after: Callable[..., list[Problem]], edit: Edit) -> None:
    assert problems_after(edit) == []


def test_one_mistake_is_reported_once(problems_after: Callable[..., list[Problem]]) -> None:
    assert len(problems_after(put("head_node_type", value="haed"))) == 1
    assert len(problems_after(replace("setup_commands", f"=={RAY}", "==2.9.3"))) == 1


def test_constraints_are_compared_with_the_setup_commands(problems_after: Callable[..., list[Problem]]) -> None:
    lines = [str(problem) for problem in problems_after(lambda cluster: None, constraints="torch==2\nray==2.9.3 ; x\n")]
    assert any(f"constraints.txt: it pins Ray 2.9.3, but Ray {RAY} is installed here" in line for line in lines)
    assert any(f"the nodes install Ray {RAY}, but constraints.txt pins 2.9.3" in line for line in lines)


def test_ray_may_be_pinned_by_the_constraints_alone(problems_after: Callable[..., list[Problem]]) -> None:
    unnamed = replace("setup_commands", f"'ray[default,tune]=={RAY}' ", "")
    assert problems_after(unnamed, constraints=f"ray=={RAY}\n") == []


def test_launch_check_reports_values_still_to_be_edited(problems_after: Callable[..., list[Problem]]) -> None:
    lines = [str(problem) for problem in problems_after(lambda cluster: None, for_launch=True)]
    unedited = [line for line in lines if f"{PLACEHOLDER} has not been replaced" in line]
    assert any("SecurityGroupIds" in line for line in unedited)
    assert any("IamInstanceProfile" in line for line in unedited)
    assert any("head_start_ray_commands" in line for line in unedited)
    assert any("file_mounts.~/bespoke-solvers/solvers: there is no" in line for line in lines)


def test_launch_check_says_how_to_make_a_token(
    problems_after: Callable[..., list[Problem]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [str(problem) for problem in problems_after(lambda cluster: None, for_launch=True)]
    assert any("auth_token" in line and "Make one: ray get-auth-token --generate" in line for line in lines)


def test_shipped_placeholders_are_the_marked_values() -> None:
    locations = [
        problem.where for problem in check_cluster_file(SHIPPED, for_launch=True) if PLACEHOLDER in problem.what
    ]
    assert [location.split(".")[-1].split("[")[0] for location in locations] == [
        "SecurityGroupIds",
        "Name",
        "head_start_ray_commands",
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cluster_name: [1, 2\n", "the file is not YAML: "),
        ("- cluster_name\n", "a cluster file is a mapping of keys to values, this one is a list"),
        ("", "a cluster file is a mapping of keys to values, this one is empty"),
    ],
)
def test_unreadable_files_are_reported(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = check_cluster_file(path)
    assert str(problem).startswith(f"{path}: {what}")


def test_missing_file_is_reported(tmp_path: Path) -> None:
    (problem,) = check_cluster_file(tmp_path / "nowhere.yaml")
    assert (
        str(problem) == f"{tmp_path / 'nowhere.yaml'}: there is no such file. Give the path of a `ray up` cluster file."
    )


def _command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["cluster", "check", *arguments])
    return result.exit_code, result.output


def test_command_prints_the_problems_and_sets_the_exit_code(tmp_path: Path) -> None:
    digits = str(REPOSITORY / "sweeps" / "configs" / "digits.yaml")
    code, output = _command(str(SHIPPED), "--config", digits)
    assert (code, output) == (0, f"{SHIPPED}: no problems found\n")
    code, output = _command(str(tmp_path / "nowhere.yaml"))
    assert code == 1
    assert "there is no such file" in output


def _demand(**changes: Any) -> dict[str, Resources]:
    values: dict[str, Any] = {"hosts": 4, "host_cpus": 1.0, "host_gpus": 0.5, "trial_cpus": 0.5} | changes
    return {"big.yaml": Resources(device="cuda" if values["host_gpus"] else "cpu", **values)}


@pytest.mark.parametrize(
    ("demand", "what"),
    [
        ({}, None),
        # The cluster has at most eight GPU nodes, each with one GPU and 8 cores.
        ({"hosts": 16}, None),
        ({"hosts": 17}, "needs 17 hosts of 1 CPU and 0.5 GPU, but the cluster has room for at most 16"),
        ({"host_gpus": 2.0}, "needs hosts of 1 CPU and 2 GPU, which fit on no worker type"),
        ({"host_cpus": 9.0}, "needs hosts of 9 CPU and 0.5 GPU, which fit on no worker type"),
        # Any ten nodes have 80 cores together.
        ({"host_gpus": 0.0, "hosts": 80}, "a trial of 0.5 CPU beside them, but all workers together have no core left"),
        ({"host_gpus": 0.0, "hosts": 81}, "needs 81 hosts of 1 CPU, but the cluster has room for at most 80"),
    ],
)
def test_demands_of_an_experiment_must_fit_the_cluster(demand: dict[str, Any], what: str | None) -> None:
    problems = [str(problem) for problem in check_cluster_file(SHIPPED, demands=_demand(**demand))]
    assert len(problems) == (what is not None)
    if what is not None:
        assert problems[0].split(": ", 1)[1].startswith("big.yaml needs ")
        assert what in problems[0]


@pytest.mark.parametrize(("hosts", "fits"), [(15, True), (16, False)])
def test_the_cores_left_for_a_trial_are_those_of_the_workers_that_the_cluster_may_have(
    problems_after: Callable[..., list[Problem]], hosts: int, fits: bool
) -> None:
    """Two workers of 8 cores hold 16 hosts and no trial, however many workers the types allow together."""
    demands = _demand(host_gpus=0.0, hosts=hosts)
    problems = [str(problem) for problem in problems_after(put("max_workers", value=2), demands=demands)]
    assert any("no core left for the trial" in problem for problem in problems) != fits


def test_hosts_with_gpus_do_not_fit_without_a_gpu_type(
    problems_after: Callable[..., list[Problem]], shipped: Cluster
) -> None:
    def edit(cluster: Cluster) -> None:
        for name in ("gpu_on_demand", "gpu_spot"):
            del cluster["available_node_types"][name]

    assert any("fit on no worker type" in str(p) for p in problems_after(edit, demands=_demand()))


def test_importing_the_check_does_not_import_ray() -> None:
    code = "import sys, orchestrator.cluster.check; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


VARIANTS = [REPOSITORY / "docs" / name for name in ("ray_cluster.gcp.yaml", "ray_cluster.ssh.yaml")]
OWN_MACHINES = VARIANTS[1]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.name)
def test_variants_have_no_problems_but_their_placeholders(variant: Path, tmp_path: Path) -> None:
    assert [str(problem) for problem in check_cluster_file(variant)] == []
    # As the first lines of the file say, it is copied to the repository's folder and used from there.
    text = variant.read_text(encoding="utf-8")
    assert "cp docs/" + variant.name in text
    copy = tmp_path / variant.name
    copy.write_text(text, encoding="utf-8")
    problems = check_cluster_file(copy, for_launch=True)
    assert {problem.what for problem in problems if not problem.where.startswith("file_mounts")} == {
        "REPLACE-ME has not been replaced"
    }
    assert re.findall(r"EDIT (\d)", text) in (["1", "2", "3", "4"], ["1", "2", "3"])


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (put("max_workers", value=3), "it is 3, but there are 2 worker_ips"),
        (put("min_workers", value=0), "it is 0, but there are 2 worker_ips"),
        (put("provider", "worker_ips", value=["a", "a"]), "an address is listed twice"),
        (
            replace("head_start_ray_commands", " --num-cpus=0", ""),
            "the head advertises its cores, so trials would run",
        ),
        (
            replace("head_start_ray_commands", "127.0.0.1 --dash", "0.0.0.0 --dash"),
            "the dashboard, which runs the jobs",
        ),
        (replace("worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""), None),
    ],
)
def test_mistakes_with_own_machines_are_reported(tmp_path: Path, edit: Edit, what: str | None) -> None:
    cluster = yaml.safe_load(OWN_MACHINES.read_text(encoding="utf-8"))
    edit(cluster)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster), encoding="utf-8")
    problems = [problem.what for problem in check_cluster_file(path)]
    # If the command does not set the mode, the profile written by the setup commands still does.
    assert problems == [] if what is None else any(what in problem for problem in problems), problems
