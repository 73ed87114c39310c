"""Checks of the commands in a cluster file: installed versions, open ports, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.cluster.check.reading import Problem, mapping, node_setups, strings, texts, written_commands

PLACEHOLDER = "REPLACE-ME"
"""Placeholder in the shipped file for values that the user must fill in."""

LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}
WILDCARD = {"0.0.0.0", "::", "[::]"}
SHELL_PROFILES = (".bashrc", ".profile", ".bash_profile", "/etc/environment", "/etc/profile")
RAY_START = re.compile(r"\bray\s+start\b")

_AUTH_MODE = re.compile(r"\bRAY_AUTH_MODE=[\"']?(\w+)")
_SECRET = re.compile(r"\b(RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN)=[\"']?\w")
_PIP_INSTALL = re.compile(r"\bpip3?\s+install\b([^;&|\n]*)")
_CONSTRAINTS = re.compile(r"(?:-c|--constraint)[\s=]+\S*constraints\.txt")
# A requirement on Ray itself, not a path such as ~/ray/x or a package whose name begins or ends with "ray".
_RAY_REQUIREMENT = re.compile(
    r"(?<![\w./~@-])ray(?P<extras>\[[^\]]*\])?(?=$|[\s'\"=<>!~@,])\s*(?P<spec>(?:===?|[<>!~]=?|@)\s*[^\s'\",]+)?"
)


def ray_version_problems(raw: Mapping[str, Any], cluster: Mapping[str, Any], constraints: Path) -> Iterator[Problem]:
    installed = metadata.version("ray")
    constrained = _constrained_ray(constraints)
    if constrained is not None and constrained != installed:
        yield Problem(
            str(constraints),
            f"it pins Ray {constrained}, but Ray {installed} is installed here",
            "Install the constrained version: client and cluster must run the same Ray",
        )
    if "setup_commands" not in raw:
        yield Problem(
            "setup_commands",
            "they are missing, so Ray's defaults would install a nightly build of another version",
            f"Install ray[default]=={installed} in setup_commands",
        )
    else:
        for where, command in written_commands(raw):
            yield from _requirement_problems(where, command, installed, constrained)

    # If no command names a version of Ray, the constraints file must pin it.
    for where, commands in node_setups(cluster):
        installs = [match for command in commands for match in _PIP_INSTALL.findall(command)]
        named = any(_RAY_REQUIREMENT.search(arguments) for arguments in installs)
        pinned = constrained is not None and any(_CONSTRAINTS.search(arguments) for arguments in installs)
        if not named and not pinned:
            yield Problem(where, "nothing pins the version of Ray", f"Install ray[default]=={installed}")


def _requirement_problems(where: str, command: str, installed: str, constrained: str | None) -> Iterator[Problem]:
    for arguments in _PIP_INSTALL.findall(command):
        for match in _RAY_REQUIREMENT.finditer(arguments):
            requirement = match.group(0).strip()
            spec = (match["spec"] or "").replace(" ", "")
            version = spec.lstrip("=") if spec.startswith("==") and "*" not in spec else None
            if version is None and not (spec == "" and constrained and _CONSTRAINTS.search(arguments)):
                yield Problem(
                    where,
                    f"{requirement!r} does not pin one version of Ray",
                    f"Write ray[default]=={installed}: client and cluster must run the same Ray",
                )
            if version is not None and version != installed:
                yield Problem(
                    where,
                    f"the nodes install Ray {version}, but Ray {installed} is installed here",
                    "Use one version: client and cluster must run the same Ray",
                )
            if version is not None and constrained not in (None, version):
                yield Problem(
                    where,
                    f"the nodes install Ray {version}, but constraints.txt pins {constrained}",
                    "Use one version in both",
                )
            if "default" not in re.split(r"[\[\],\s]+", match["extras"] or ""):
                yield Problem(
                    where,
                    f"{requirement!r} lacks the extra `default`, without which there is no dashboard and no jobs API",
                    f"Write ray[default]=={installed}",
                )


def _constrained_ray(constraints: Path) -> str | None:
    """The version to which a constraints file pins Ray, or None."""
    if not constraints.is_file():
        return None
    match = re.search(r"^ray(?:\[[^\]]*\])?\s*==\s*([^\s;#]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def start_command_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    head_starts, worker_starts = (
        [command for command in strings(cluster.get(key)) if RAY_START.search(command)]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    )
    for where, starts in (("head_start_ray_commands", head_starts), ("worker_start_ray_commands", worker_starts)):
        if not starts:
            yield Problem(where, "no command runs `ray start`", "Take the commands of ray_cluster.yaml")

    for command in head_starts:
        for host in re.findall(r"--dashboard-host[=\s]+[\"']?([^\s\"';]+)", command):
            if host not in LOOPBACK:
                yield Problem(
                    "head_start_ray_commands",
                    f"the dashboard, which runs the jobs it is sent, listens on {host}",
                    "Use --dashboard-host=127.0.0.1 and reach it with `ray dashboard` or an SSH tunnel",
                )
    if head_starts and not any("--autoscaling-config" in command for command in head_starts):
        yield Problem(
            "head_start_ray_commands",
            "`ray start` is not given --autoscaling-config, so no worker is ever started",
            "Add --autoscaling-config=~/ray_bootstrap_config.yaml",
        )

    setups = dict(node_setups(cluster))
    head_setup = setups.pop("head_setup_commands")
    for where, starts, before in (
        ("head_start_ray_commands", head_starts, [head_setup]),
        ("worker_start_ray_commands", worker_starts, list(setups.values())),
    ):
        for command in starts:
            modes = _AUTH_MODE.findall(RAY_START.split(command)[0])
            by_profile = all(_profile_sets_token_mode(setup) for setup in before)
            if not (modes[-1] == "token" if modes else by_profile):
                yield Problem(
                    where,
                    "Ray is started without RAY_AUTH_MODE=token, so anyone who can reach its ports can run code",
                    "Write RAY_AUTH_MODE=token ray start …; an export in a separate command has no effect",
                )


def _profile_sets_token_mode(commands: Sequence[str]) -> bool:
    """Whether a setup command writes RAY_AUTH_MODE=token to a profile that later shells read."""
    return any(
        _AUTH_MODE.findall(command)[-1:] == ["token"] and any(profile in command for profile in SHELL_PROFILES)
        for command in commands
    )


def token_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    mounted = any(str(target).endswith(".ray/auth_token") for target in mapping(raw.get("file_mounts")))
    elsewhere = any("RAY_AUTH_TOKEN_PATH=" in command for _, command in written_commands(raw))
    if not mounted and not elsewhere:
        yield Problem(
            "file_mounts",
            "the token file is not copied to the nodes, so workers cannot join the head",
            "Add ~/.ray/auth_token: ~/.ray/auth_token",
        )
    for where, command in written_commands(raw):
        for name in _SECRET.findall(command):
            yield Problem(
                where,
                f"a command sets {name}: the file, its copies and the logs would hold the secret",
                "Mount the token as a file, and use the instance profile instead of keys",
            )


def mlflow_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    for where, command in written_commands(raw):
        if not re.search(r"\bmlflow\b[\"']?\s+server\b", command):
            continue
        for host in re.findall(r"(?<=\s)(?:--host|-h)[=\s]+[\"']?([^\s\"';]+)", command):
            if host in WILDCARD:
                yield Problem(
                    where,
                    f"the MLflow server, which requires no password, listens on {host}",
                    "Bind it to the head's private address or to 127.0.0.1",
                )
            elif host not in LOOPBACK and "--allowed-hosts" not in command:
                yield Problem(
                    where,
                    f"the MLflow server listens on {host} without --allowed-hosts",
                    "List the names it is reached by, for example --allowed-hosts bespoke-head:5000,localhost:5000",
                )


def launch_problems(raw: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    for where, text in texts(raw):
        if PLACEHOLDER in text:
            yield Problem(where, f"{PLACEHOLDER} has not been replaced", "Write your own value: see docs/cluster.md")
    for target, source in mapping(raw.get("file_mounts")).items():
        local = folder / Path(str(source)).expanduser()
        if not local.exists():
            token = str(target).endswith(".ray/auth_token")
            remedy = (
                "Make one: ray get-auth-token --generate" if token else "Run from the repository, or drop the mount"
            )
            yield Problem(f"file_mounts.{target}", f"there is no {local}", remedy)
