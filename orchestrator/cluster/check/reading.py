"""Access to the parts of a cluster file that may be malformed, and the :class:`Problem` type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Problem:
    """A problem of a cluster file: where it is, what is wrong, and the remedy."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        stop = "" if self.remedy.endswith("?") else "."
        return f"{self.where}: {self.what}. {self.remedy}{stop}"


def written_commands(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every command as written in the file, with the key of its list."""
    of_type = ("initialization_commands", "worker_setup_commands")
    of_file = (
        *of_type,
        "setup_commands",
        "head_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    lists = [(key, raw.get(key)) for key in of_file] + [
        (f"available_node_types.{name}.{key}", mapping(node_type).get(key))
        for name, node_type in mapping(raw.get("available_node_types")).items()
        for key in of_type
    ]
    for where, commands in lists:
        yield from ((where, command) for command in strings(commands))


def node_setups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The commands that run on each kind of node before Ray starts. Ray has put the common commands first."""
    common = strings(cluster.get("initialization_commands"))
    yield "head_setup_commands", common + strings(cluster.get("head_setup_commands"))
    yield "worker_setup_commands", common + strings(cluster.get("worker_setup_commands"))
    for name, node_type in worker_types(cluster):
        if "worker_setup_commands" in node_type:  # these replace the common ones
            own = node_type.get("initialization_commands", common)
            where = f"available_node_types.{name}.worker_setup_commands"
            yield where, strings(own) + strings(node_type["worker_setup_commands"])


def worker_types(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, node_type in mapping(cluster.get("available_node_types")).items():
        if name != cluster.get("head_node_type"):
            yield str(name), mapping(node_type)


def texts(value: Any, where: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """Every string in a loaded file with its path. Aliases (the same object) are visited once, at their definition."""
    seen = set() if seen is None else seen
    if isinstance(value, str):
        yield where, value
        return
    if id(value) in seen:
        return
    if isinstance(value, Mapping):
        seen.add(id(value))
        for key, inner in value.items():
            yield from texts(inner, f"{where}.{key}" if where else str(key), seen)
    elif isinstance(value, list):
        seen.add(id(value))
        for index, inner in enumerate(value):
            yield from texts(inner, f"{where}[{index}]", seen)


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def strings(value: Any) -> list[str]:
    """The strings in ``value``; empty if it is not a list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
