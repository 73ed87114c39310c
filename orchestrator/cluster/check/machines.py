"""Checks of the machines in a cluster file: their number, their resources, and whether experiments fit on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.check.commands import RAY_START
from orchestrator.cluster.check.reading import Problem, is_whole, mapping, strings, worker_types
from orchestrator.progress import counted

if TYPE_CHECKING:
    from orchestrator.config.sections import Resources

Nodes = tuple[int, Mapping[str, Any]]
"""Maximum number of workers of a type, and the resources of each."""

# AWS families with GPUs: p3, p4d, p5en, p6-b200, g4dn, g5, g6e, gr6 …
_AWS_GPU_INSTANCE = re.compile(r"(?:p|g|gr)\d[\w-]*\.")


def worker_limit_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    limit = cluster.get("max_workers")
    if not is_whole(limit):
        return  # reported by the schema check
    total = 0
    for name, node_type in worker_types(cluster):
        where = f"available_node_types.{name}"
        minimum, maximum = node_type.get("min_workers", 0), node_type.get("max_workers", limit)
        if not (is_whole(minimum) and is_whole(maximum)):
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


def resource_problems(cluster: Mapping[str, Any]) -> Iterator[Problem]:
    head_name = str(cluster.get("head_node_type"))
    head = mapping(mapping(cluster.get("available_node_types")).get(head_name))
    head_cpus = mapping(head.get("resources")).get("CPU")
    if head and head_cpus != 0:
        declaration = (
            "does not declare CPU, so all of its cores are advertised"
            if head_cpus is None
            else f"advertises CPU {head_cpus}"
        )
        yield Problem(
            f"available_node_types.{head_name}.resources",
            f"the head {declaration}, so trials would run beside the scheduler",
            "Declare CPU: 0",
        )

    on_aws = mapping(cluster.get("provider")).get("type") == "aws"
    any_gpu = False
    for name, node_type in worker_types(cluster):
        where = f"available_node_types.{name}.resources"
        resources = mapping(node_type.get("resources"))
        declares_gpu = bool(resources.get("GPU"))
        any_gpu |= declares_gpu
        instance = str(mapping(node_type.get("node_config")).get("InstanceType", ""))
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
            "no worker type declares a GPU, so hosts that request one would wait forever",
            "Add a worker type with GPU in its resources",
        )


def own_machine_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Checks for the user's own machines: all of them are workers, and the head runs no trials."""
    workers = strings(mapping(raw.get("provider")).get("worker_ips"))
    for key in ("min_workers", "max_workers"):
        # Ray uses every machine if the key is omitted.
        if key in raw and raw[key] != len(workers):
            yield Problem(key, f"it is {raw[key]}, but there are {len(workers)} worker_ips", "Set it to their number")
    if len(set(workers)) < len(workers):
        yield Problem("provider.worker_ips", "an address is listed twice", "List each machine once")
    starts = [command for command in strings(raw.get("head_start_ray_commands")) if RAY_START.search(command)]
    if starts and not any(re.search(r"--num-cpus[=\s]+0\b", command) for command in starts):
        yield Problem(
            "head_start_ray_commands",
            "the head advertises its cores, so trials would run beside the scheduler",
            "Add --num-cpus=0 to `ray start --head`",
        )


def idle_timeout_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    if "idle_timeout_minutes" not in raw:
        yield Problem(
            "idle_timeout_minutes",
            "it is not set, so Ray's default decides how long idle workers are paid for",
            "Set it, for example to 10",
        )


def demand_problems(cluster: Mapping[str, Any], demands: Mapping[str, Resources]) -> Iterator[Problem]:
    """A host must fit on one node; all hosts and one trial must fit on the largest possible cluster."""
    limit = cluster.get("max_workers")
    if not is_whole(limit):
        return  # reported by the schema check
    nodes: list[Nodes] = []
    for _, node_type in worker_types(cluster):
        maximum = node_type.get("max_workers", limit)
        nodes.append((maximum if is_whole(maximum) else 0, mapping(node_type.get("resources"))))
    for name, demand in demands.items():
        host = {"CPU": demand.host_cpus, "GPU": demand.host_gpus}
        size = f"{demand.host_cpus:g} CPU" + (f" and {demand.host_gpus:g} GPU" if demand.host_gpus else "")
        if not any(_fitting(resources, host) for _, resources in nodes):
            yield Problem(
                "available_node_types",
                f"{name} needs hosts of {size}, which fit on no worker type",
                "Declare a type with these resources, or lower the experiment's resources.host_cpus or host_gpus",
            )
        elif (room := _room(nodes, limit, host)) < demand.hosts:
            yield Problem(
                "max_workers",
                f"{name} needs {counted(demand.hosts, 'host')} of {size}, but the cluster has room for at most {room}",
                "Raise max_workers, the cluster's and the types', or lower the experiment's resources.hosts",
            )
        elif _room_beside_trial(nodes, limit, host, demand.trial_cpus) < demand.hosts:
            yield Problem(
                "max_workers",
                f"{name} needs {counted(demand.hosts, 'host')} of {size} and a trial of {demand.trial_cpus:g} CPU "
                "beside them, but all workers together have no core left for the trial",
                "Raise max_workers, the cluster's and that of a type with cores, or lower the experiment's "
                "resources.hosts",
            )


def _room(nodes: Sequence[Nodes], limit: int, host: Mapping[str, float]) -> int:
    """Number of hosts that fit on at most ``limit`` workers."""
    room = 0
    # Types that hold the most hosts come first. Otherwise small ones would use up the cluster's limit.
    for fitting, count in sorted(((_fitting(resources, host), count) for count, resources in nodes), reverse=True):
        room += fitting * min(count, limit)
        limit -= min(count, limit)
    return room


def _room_beside_trial(nodes: Sequence[Nodes], limit: int, host: Mapping[str, float], trial_cpus: float) -> int:
    """Number of hosts that fit if one worker, of whichever type is best, also runs a trial."""
    rooms = [0]
    for index, (count, resources) in enumerate(nodes):
        cpus = float(resources.get("CPU", 0)) - trial_cpus
        if count and limit and cpus >= 0:
            others = [*nodes[:index], (count - 1, resources), *nodes[index + 1 :]]
            rooms.append(_fitting({**resources, "CPU": cpus}, host) + _room(others, limit - 1, host))
    return max(rooms)


def _fitting(resources: Mapping[str, Any], host: Mapping[str, float]) -> int:
    """Number of hosts that fit on a node with these resources."""
    return min(int(float(resources.get(unit, 0)) / amount + 1e-9) for unit, amount in host.items() if amount)
