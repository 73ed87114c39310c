"""Checks a ``ray up`` cluster file without a network or a cloud account.

Ray's own validation finds misspelt keys and a head type that does not exist. It accepts a file whose dashboard listens
on every interface, whose nodes install another version of Ray, whose GPU workers name no GPU, or whose worker limits
contradict each other. Such a file costs money or opens the cluster before anybody notices, so those are found here.

From a shell: ``python -m orchestrator.cluster_check ray_cluster.yaml --for-launch``.
"""

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

import yaml

PLACEHOLDER = "REPLACE-ME"
"""Stands, in the shipped file, where a value of the user's own belongs."""

LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}
WILDCARD = {"0.0.0.0", "::", "[::]"}
SHELL_PROFILES = (".bashrc", ".profile", ".bash_profile", "/etc/environment", "/etc/profile")

_RAY_START = re.compile(r"\bray\s+start\b")
_AUTH_MODE = re.compile(r"\bRAY_AUTH_MODE=[\"']?(\w+)")
_SECRET = re.compile(r"\b(RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN)=[\"']?\w")
_PIP_INSTALL = re.compile(r"\bpip3?\s+install\b([^;&|\n]*)")
_CONSTRAINTS = re.compile(r"(?:-c|--constraint)[\s=]+\S*constraints\.txt")
# A requirement on Ray itself: not a path such as ~/ray/x, not a package whose name begins or ends with "ray".
_RAY_REQUIREMENT = re.compile(
    r"(?<![\w./~@-])ray(?P<extras>\[[^\]]*\])?(?=$|[\s'\"=<>!~@,])\s*(?P<spec>(?:===?|[<>!~]=?|@)\s*[^\s'\",]+)?"
)
# AWS families with GPUs: p3, p4d, p5en, p6-b200, g4dn, g5, g6e, gr6 …
_AWS_GPU_INSTANCE = re.compile(r"(?:p|g|gr)\d[\w-]*\.")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a cluster file: where it is, what it is, and what to do about it."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        stop = "" if self.remedy.endswith("?") else "."
        return f"{self.where}: {self.what}. {self.remedy}{stop}"


def check_cluster_file(path: str | Path, *, for_launch: bool = False) -> list[Problem]:
    """Returns what is wrong with a cluster file; an empty list if nothing was found.

    Args:
        path: The YAML file that ``ray up`` would be given.
        for_launch: Also report what a file may lack until the day it is used: values still to be filled in, and
            mounted files that are not on this machine.

    Nothing is asked of a cloud, so a mistyped instance type, image or security group is not found.
    """
    path = Path(path)
    raw = _load(path)
    if isinstance(raw, Problem):
        return [raw]

    # Ray makes the one node type of one's own machines itself.
    own_machines = _mapping(raw.get("provider")).get("type") == "local"
    head_problems = [] if own_machines else list(_head_type_problems(raw))
    prepared, ray_problems = _ray_problems(raw, head_type_is_known_bad=bool(head_problems))
    problems = head_problems + ray_problems
    # Ray's defaults decide what a key left out means. Where it could not apply them, the rest would be guesswork.
    if prepared is not None:
        if own_machines:
            problems += _own_machine_problems(raw)
        else:
            problems += _worker_limit_problems(prepared)
            problems += _resource_problems(prepared)
        problems += _idle_timeout_problems(raw)
        problems += _ray_version_problems(raw, prepared, path.parent / "constraints.txt")
        problems += _start_command_problems(prepared)
        problems += _token_problems(raw)
        problems += _mlflow_problems(raw)
    if for_launch:
        problems += _launch_problems(raw, path.parent)
    return problems


def _load(path: Path) -> dict[str, Any] | Problem:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Problem(str(path), "there is no such file", "Give the path of a `ray up` cluster file")
    except (OSError, UnicodeDecodeError) as error:
        return Problem(str(path), f"the file cannot be read: {error}", "Give the path of a readable YAML file")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return Problem(str(path), f"the file is not YAML: {reason}", "Mend the line that is named")
    if not isinstance(loaded, dict):
        found = "empty" if loaded is None else f"a {type(loaded).__name__}"
        return Problem(
            str(path),
            f"a cluster file is a mapping of keys to values, this one is {found}",
            "Start from ray_cluster.yaml",
        )
    return loaded


def _ray_problems(raw: dict[str, Any], *, head_type_is_known_bad: bool) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Runs Ray's validation; returns the file with Ray's defaults filled in (None if impossible) and the problems."""
    # Imported here and not above: importing Ray is slow and belongs in few places, and everything else in this
    # module does without it. The two functions are private to Ray; no public one validates without calling the cloud.
    try:
        from jsonschema import ValidationError  # type: ignore[import-untyped]
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        problem = Problem(
            "ray", f"Ray's validation is not installed: {error}", "Install it: pip install 'ray[default]'"
        )
        return None, [problem]

    try:
        # Ray prints warnings that hold for Docker alone, whether the file uses it or not.
        with contextlib.redirect_stdout(io.StringIO()):
            prepared = prepare_config(raw)
    except Exception as error:  # Ray lets whatever a malformed file provokes through: KeyError, TypeError, …
        if isinstance(error, KeyError) and error.args == ("head_node_type",) and head_type_is_known_bad:
            return None, []
        what = f"the key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        return None, [Problem("Ray's validation", what, "Compare the file with ray_cluster.yaml")]
    try:
        validate_config(prepared)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "top level"
        return prepared, [Problem(where, error.message, _schema_remedy(error))]
    except Exception as error:  # as above; ValueError for what the schema cannot say
        if "head_node_type" in str(error) and head_type_is_known_bad:
            return prepared, []
        return prepared, [Problem("Ray's validation", str(error).rstrip("."), "Change the file accordingly")]
    return prepared, []


def _schema_remedy(error: Any) -> str:
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = [key for key in error.instance if key not in known]
        nearest = [match for key in unknown for match in difflib.get_close_matches(key, known, n=1)]
        if nearest:
            return f"Did you mean {', '.join(nearest)}?"
        return f"Use one of {', '.join(sorted(known))}"
    if error.validator == "required":
        return "Add the missing key"
    return f"Give it a value of type {error.validator_value}" if error.validator == "type" else "Change the value"


def _head_type_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    if "available_node_types" not in raw:
        yield Problem(
            "available_node_types",
            "no node type is declared, so Ray would start its own default machines",
            "Declare a head and at least one worker type, as ray_cluster.yaml does",
        )
        return
    names = list(_mapping(raw["available_node_types"]))
    head = raw.get("head_node_type")
    if head not in names:
        what = "is missing" if head is None else f"is {head!r}, which is not a node type"
        yield Problem("head_node_type", f"the head's type {what}", f"Name one of available_node_types: {names}")


def _worker_limit_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    limit = cluster.get("max_workers")
    if not _is_whole(limit):
        return  # the schema has said so
    total = 0
    for name, node_type in _worker_types(cluster):
        where = f"available_node_types.{name}"
        minimum, maximum = node_type.get("min_workers", 0), node_type.get("max_workers", limit)
        if not (_is_whole(minimum) and _is_whole(maximum)):
            continue
        total += maximum
        if minimum > maximum:
            yield Problem(
                where, f"min_workers {minimum} exceeds max_workers {maximum}", "Raise max_workers or lower min_workers"
            )
        if maximum > limit:
            yield Problem(
                where,
                f"max_workers {maximum} exceeds the whole cluster's max_workers {limit}, so it is never reached",
                f"Lower it to {limit} or raise the top-level max_workers",
            )
    if total < limit:
        yield Problem(
            "max_workers",
            f"the worker types allow {total} workers together, fewer than the cluster's max_workers {limit}",
            f"Lower it to {total} or raise the max_workers of a type",
        )


def _resource_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    head_name = str(cluster.get("head_node_type"))
    head = _mapping(_mapping(cluster.get("available_node_types")).get(head_name))
    head_cpus = _mapping(head.get("resources")).get("CPU")
    if head and head_cpus != 0:
        found = (
            "does not declare CPU, so all of its cores are advertised"
            if head_cpus is None
            else f"advertises CPU {head_cpus}"
        )
        yield Problem(
            f"available_node_types.{head_name}.resources",
            f"the head {found}, and trials would run beside the scheduler",
            "Declare CPU: 0",
        )

    on_aws = _mapping(cluster.get("provider")).get("type") == "aws"
    any_gpu = False
    for name, node_type in _worker_types(cluster):
        where = f"available_node_types.{name}.resources"
        resources = _mapping(node_type.get("resources"))
        declares_gpu = bool(resources.get("GPU"))
        any_gpu |= declares_gpu
        instance = str(_mapping(node_type.get("node_config")).get("InstanceType", ""))
        if not (on_aws and instance):
            continue
        has_gpu = _AWS_GPU_INSTANCE.match(instance) is not None
        if has_gpu and not declares_gpu:
            yield Problem(
                where,
                f"{instance} has a GPU, but the resources are {dict(resources)}",
                "Declare GPU as well: Ray fills it in only if AWS answers when the cluster is started",
            )
        if declares_gpu and not has_gpu:
            yield Problem(
                where,
                f"GPU {resources['GPU']} is declared, but {instance} has none",
                "Choose a p or g instance type, or remove GPU",
            )
    if not any_gpu:
        yield Problem(
            "available_node_types",
            "no worker type declares a GPU, so hosts that ask for one wait for ever",
            "Add a worker type with GPU in its resources",
        )


def _own_machine_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """For machines that are there anyway: all of them work, and the head does not."""
    workers = _strings(_mapping(raw.get("provider")).get("worker_ips"))
    for key in ("min_workers", "max_workers"):
        # Ray takes every machine where the key is left out.
        if key in raw and raw[key] != len(workers):
            yield Problem(key, f"it is {raw[key]}, and there are {len(workers)} worker_ips", "Give it their number")
    if len(set(workers)) < len(workers):
        yield Problem("provider.worker_ips", "an address is there twice", "Name each machine once")
    starts = [command for command in _strings(raw.get("head_start_ray_commands")) if _RAY_START.search(command)]
    if starts and not any(re.search(r"--num-cpus[=\s]+0\b", command) for command in starts):
        yield Problem(
            "head_start_ray_commands",
            "the head advertises its cores, and trials would run beside the scheduler",
            "Give `ray start --head` --num-cpus=0",
        )


def _idle_timeout_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    if "idle_timeout_minutes" not in raw:
        yield Problem(
            "idle_timeout_minutes",
            "it is not set, and how long idle workers are paid for is left to Ray's default",
            "Set it, for example to 10",
        )


def _ray_version_problems(raw: Mapping[str, Any], cluster: Mapping[str, Any], constraints: Path) -> Iterator[Problem]:
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
            "they are missing, and Ray's own install a nightly build of another version",
            f"Install ray[default]=={installed} in setup_commands",
        )
    else:
        for where, commands in _written_commands(raw):
            for command in commands:
                yield from _requirement_problems(where, command, installed, constrained)

    # What no command names must at least be held by the constraints.
    for where, commands in _node_setups(cluster):
        installs = [match for command in commands for match in _PIP_INSTALL.findall(command)]
        named = any(_RAY_REQUIREMENT.search(arguments) for arguments in installs)
        held = constrained is not None and any(_CONSTRAINTS.search(arguments) for arguments in installs)
        if not named and not held:
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
    """The version that a constraints file pins Ray to, or None."""
    if not constraints.is_file():
        return None
    match = re.search(r"^ray(?:\[[^\]]*\])?\s*==\s*([^\s;#]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def _start_command_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    head_starts = [
        command for command in _strings(cluster.get("head_start_ray_commands")) if _RAY_START.search(command)
    ]
    worker_starts = [
        command for command in _strings(cluster.get("worker_start_ray_commands")) if _RAY_START.search(command)
    ]
    for where, starts in (("head_start_ray_commands", head_starts), ("worker_start_ray_commands", worker_starts)):
        if not starts:
            yield Problem(where, "no command runs `ray start`", "Take the commands of ray_cluster.yaml")

    for command in head_starts:
        hosts = re.findall(r"--dashboard-host[=\s]+[\"']?([^\s\"';]+)", command)
        for host in hosts:
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

    setups = dict(_node_setups(cluster))
    head_setup = setups.pop("head_setup_commands")
    for where, starts, node_setups in (
        ("head_start_ray_commands", head_starts, [head_setup]),
        ("worker_start_ray_commands", worker_starts, list(setups.values())),
    ):
        for command in starts:
            modes = _AUTH_MODE.findall(_RAY_START.split(command)[0])
            by_profile = all(_profile_sets_token_mode(setup) for setup in node_setups)
            if not (modes[-1] == "token" if modes else by_profile):
                yield Problem(
                    where,
                    "Ray is started without RAY_AUTH_MODE=token, so whoever reaches its ports can run code",
                    "Write RAY_AUTH_MODE=token ray start …; an export in a command of its own is forgotten",
                )


def _profile_sets_token_mode(commands: Sequence[str]) -> bool:
    """Whether some setup command writes RAY_AUTH_MODE=token where later shells read it."""
    return any(
        _AUTH_MODE.findall(command)[-1:] == ["token"] and any(profile in command for profile in SHELL_PROFILES)
        for command in commands
    )


def _token_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    mounted = any(str(target).endswith(".ray/auth_token") for target in _mapping(raw.get("file_mounts")))
    elsewhere = any("RAY_AUTH_TOKEN_PATH=" in command for _, commands in _written_commands(raw) for command in commands)
    if not mounted and not elsewhere:
        yield Problem(
            "file_mounts",
            "the token file is not copied to the nodes, so workers cannot join the head",
            "Add ~/.ray/auth_token: ~/.ray/auth_token",
        )
    for where, commands in _written_commands(raw):
        for command in commands:
            for name in _SECRET.findall(command):
                yield Problem(
                    where,
                    f"a command sets {name}: the file, its copies and the logs would hold the secret",
                    "Mount the token as a file, and let the instance profile stand for keys",
                )


def _mlflow_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    for where, commands in _written_commands(raw):
        for command in commands:
            if not re.search(r"\bmlflow\b[\"']?\s+server\b", command):
                continue
            for host in re.findall(r"(?<=\s)(?:--host|-h)[=\s]+[\"']?([^\s\"';]+)", command):
                if host in WILDCARD:
                    yield Problem(
                        where,
                        f"the MLflow server, which asks for no password, listens on {host}",
                        "Bind it to the head's private address or to 127.0.0.1",
                    )
                elif host not in LOOPBACK and "--allowed-hosts" not in command:
                    yield Problem(
                        where,
                        f"the MLflow server listens on {host} without --allowed-hosts",
                        "List the names it is reached by, for example --allowed-hosts bespoke-head:5000,localhost:5000",
                    )


def _launch_problems(raw: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    for where, text in _texts(raw):
        if PLACEHOLDER in text:
            yield Problem(where, f"{PLACEHOLDER} has not been replaced", "Write your own value: see docs/cluster.md")
    for target, source in _mapping(raw.get("file_mounts")).items():
        local = folder / Path(str(source)).expanduser()
        if not local.exists():
            token = str(target).endswith(".ray/auth_token")
            remedy = (
                "Make one: ray get-auth-token --generate" if token else "Run from the repository, or drop the mount"
            )
            yield Problem(f"file_mounts.{target}", f"there is no {local}", remedy)


def _written_commands(raw: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The lists of commands as the file has them, each under its own name."""
    for key in (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        yield key, _strings(raw.get(key))
    for name, node_type in _mapping(raw.get("available_node_types")).items():
        for key in ("initialization_commands", "worker_setup_commands"):
            yield f"available_node_types.{name}.{key}", _strings(_mapping(node_type).get(key))


def _node_setups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """All that is run on each kind of node before Ray starts; Ray has put the common commands first."""
    common = _strings(cluster.get("initialization_commands"))
    yield "head_setup_commands", common + _strings(cluster.get("head_setup_commands"))
    yield "worker_setup_commands", common + _strings(cluster.get("worker_setup_commands"))
    for name, node_type in _worker_types(cluster):
        if "worker_setup_commands" in node_type:  # instead of the common ones, not after them
            own = node_type.get("initialization_commands", common)
            where = f"available_node_types.{name}.worker_setup_commands"
            yield where, _strings(own) + _strings(node_type["worker_setup_commands"])


def _worker_types(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, node_type in _mapping(cluster.get("available_node_types")).items():
        if name != cluster.get("head_node_type"):
            yield str(name), _mapping(node_type)


def _texts(value: Any, where: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """Every string in a loaded file, with its place; what aliases repeat (the same object) only where it is defined."""
    seen = set() if seen is None else seen
    if isinstance(value, str):
        yield where, value
        return
    if id(value) in seen:
        return
    if isinstance(value, Mapping):
        seen.add(id(value))
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}" if where else str(key), seen)
    elif isinstance(value, list):
        seen.add(id(value))
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{index}]", seen)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the problems of a cluster file; returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster_check",
        description="Checks a `ray up` cluster file without calling a cloud.",
    )
    parser.add_argument("path", nargs="?", default="ray_cluster.yaml")
    parser.add_argument("--for-launch", action="store_true", help="also report values still to be filled in")
    options = parser.parse_args(arguments)
    problems = check_cluster_file(options.path, for_launch=options.for_launch)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{options.path}: no problems found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
