"""Checks a ``ray up`` cluster file without a network or a cloud account.

Ray's own validation finds misspelt keys and a head type that does not exist. It accepts a file whose dashboard listens
on every interface, whose nodes install another version of Ray, whose GPU workers name no GPU, or whose worker limits
contradict each other. Such mistakes cost money or expose the cluster before they are noticed, so they are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cluster.check.commands import (
    PLACEHOLDER,
    launch_problems,
    mlflow_problems,
    ray_version_problems,
    start_command_problems,
    token_problems,
)
from orchestrator.cluster.check.machines import (
    demand_problems,
    idle_timeout_problems,
    own_machine_problems,
    resource_problems,
    worker_limit_problems,
)
from orchestrator.cluster.check.reading import Problem, mapping
from orchestrator.cluster.check.schema import head_type_problems, load, ray_problems

if TYPE_CHECKING:
    from orchestrator.config.sections import Resources

__all__ = ["PLACEHOLDER", "Problem", "check_cluster_file"]


def check_cluster_file(
    path: str | Path, *, demands: Mapping[str, Resources] | None = None, for_launch: bool = False
) -> list[Problem]:
    """Return the problems of a cluster file; an empty list if there are none.

    Args:
        path: The YAML file for ``ray up``.
        demands: Resources of the experiments that will run there, by name.
        for_launch: Also report what matters only at launch: placeholders that are not filled in, and mounted files
            that do not exist on this machine.

    No cloud is called, so a mistyped instance type, image or security group goes unnoticed.
    """
    path = Path(path)
    raw = load(path)
    if isinstance(raw, Problem):
        return [raw]

    # For the user's own machines, Ray generates the single node type itself.
    own_machines = mapping(raw.get("provider")).get("type") == "local"
    head_problems = [] if own_machines else list(head_type_problems(raw))
    prepared, found_by_ray = ray_problems(raw, head_type_is_known_bad=bool(head_problems))
    problems = head_problems + found_by_ray
    # Ray's defaults define the meaning of omitted keys. Without them, the other checks would be guesswork.
    if prepared is not None:
        if own_machines:
            problems += own_machine_problems(raw)
        else:
            problems += worker_limit_problems(prepared)
            problems += resource_problems(prepared)
            problems += demand_problems(prepared, demands or {})
        problems += idle_timeout_problems(raw)
        problems += ray_version_problems(raw, prepared, path.parent / "constraints.txt")
        problems += start_command_problems(prepared)
        problems += token_problems(raw)
        problems += mlflow_problems(raw)
    if for_launch:
        problems += launch_problems(raw, path.parent)
    return problems
