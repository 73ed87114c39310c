"""``bespoke doctor``: checks the environment and suggests remedies. Leaves at most an empty storage folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.markup import escape
from rich.table import Table

from orchestrator import plugins
from orchestrator.errors import ConfigError, UserError
from orchestrator.outside import ask
from orchestrator.storage import Storage
from orchestrator.tracking.uri import resolve_tracking_uri, sqlite_path
from orchestrator.uris import shown

PROJECT = "bespoke-solvers"

State = Literal["ok", "optional", "missing"]

#: Kinds of plugins that may need weights, packages or files. Their own errors say what is missing.
WITH_NEEDS = ("metrics", "features", "objectives", "decoders", "datasets")


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        part: Area of the check: 'packages', 'machine', 'ray', 'storage', 'mlflow' or 'plugins'.
        name: Name of the checked item.
        state: 'ok'; 'optional': absent, but only some configurations need it; 'missing': no command works without it.
        found: Description of the current state.
        remedy: What to do; empty if nothing needs to be done.
    """

    part: str
    name: str
    state: State
    found: str
    remedy: str = ""


def diagnose(storage: str, tracking_uri: str | None, address: str | None) -> Iterator[Finding]:
    """Check this machine, or the cluster at ``address``; findings are yielded one by one.

    Args:
        storage: Root of pairs and results.
        tracking_uri: MLflow store; None for the one that a sweep would use beside the storage.
        address: Ray cluster; None to check whether Ray can start on this machine.
    """
    yield from packages()
    yield from machine()
    yield from plugin_needs()
    store, writable = _storage(storage)
    yield writable
    uri, tracking = _tracking(tracking_uri, storage)
    yield tracking
    yield from _ray(address, store if writable.state == "ok" else None, uri if tracking.state == "ok" else None)


def works(findings: list[Finding]) -> bool:
    """Whether nothing is missing that every command needs."""
    return all(finding.state != "missing" for finding in findings)


# ---- this machine -------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Check Python and every required package; packages of an extra are labelled with it."""
    try:
        about = metadata.metadata(PROJECT)
        requirements = [Requirement(line) for line in metadata.requires(PROJECT) or []]
    except metadata.PackageNotFoundError:
        yield Finding("packages", PROJECT, "missing", "not installed", "pip install -c constraints.txt -e .")
        return
    yield Finding("packages", PROJECT, "ok", metadata.version(PROJECT))
    required = about["Requires-Python"] or ""
    fits = SpecifierSet(required).contains(platform.python_version(), prereleases=True)
    remedy = "" if fits else f"use a Python {required}"
    yield Finding("packages", "python", "ok" if fits else "missing", platform.python_version(), remedy)
    extras = [extra for extra in about.get_all("Provides-Extra") or [] if extra != "dev"]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, None)
    for extra in extras:
        for requirement in requirements:
            marker = requirement.marker
            if marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra}):
                yield _package(requirement, extra)


def _package(requirement: Requirement, extra: str | None) -> Finding:
    absent: State = "missing" if extra is None else "optional"
    name = requirement.name if extra is None else f"{requirement.name} [{extra}]"
    remedy = (
        f"pip install '{PROJECT}[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
    )
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding("packages", name, absent, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", name, absent, f"{version}, but {requirement.specifier} is needed", remedy)
    return Finding("packages", name, "ok", version)


def machine() -> Iterator[Finding]:
    """Report the cores, memory and accelerators available to this process."""
    yield Finding("machine", "cores", "ok", f"{_cores()} of {os.cpu_count()}")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _memory_limit()
    text = f"{total / 1e9:.1f} GB" + (f", limited to {limit / 1e9:.1f} GB" if limit and limit < total else "")
    yield Finding("machine", "memory", "ok", text)
    import torch

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding("machine", f"cuda:{index}", "ok", f"{facts.name}, {facts.total_memory / 1e9:.1f} GB")
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        remedy = "needed only for resources.device: cuda; install a matching driver, or use device: cpu"
        yield Finding("machine", "GPU", "optional", why, remedy)


def _cores() -> int:
    """Number of cores this process may run on; in a container, this can be less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_limit() -> int | None:
    """Memory limit of the control group in bytes, or None."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def plugin_needs() -> Iterator[Finding]:
    """Check whether each plugin works with its default options: weights, packages and downloaded files.

    Each plugin is built, so new plugins are covered without a change here. Metrics must also accept at least one of
    the datasets, by their ``check(dataset)``. Plugins with required options are skipped.
    """
    datasets: dict[str, Any] = {}
    for kind in ("datasets", *(kind for kind in WITH_NEEDS if kind != "datasets")):
        for name in plugins.names(kind):
            try:
                factory = plugins.load(kind, name)
                if _needs_options(factory):
                    continue
                plugin = plugins.build(kind, name)
                if kind == "datasets":
                    datasets[name] = plugin
                elif kind == "metrics":
                    _accepts_any(plugin, datasets)
            except (ConfigError, ImportError) as error:
                yield Finding("plugins", f"{kind} {name}", "optional", *_told(error))
            else:
                yield Finding("plugins", f"{kind} {name}", "ok", "ready")


def _needs_options(factory: Any) -> bool:
    return is_dataclass(factory) and any(
        f.init and f.default is MISSING and f.default_factory is MISSING for f in fields(factory)
    )


def _accepts_any(metric: Any, datasets: Mapping[str, Any]) -> None:
    """Raise the first refusal if the metric refuses every dataset."""
    refusal: ConfigError | None = None
    for dataset in datasets.values():
        try:
            metric.check(dataset)
        except ConfigError as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal


# ---- storage, MLflow, Ray -----------------------------------------------------------------------------------------


def _storage(root: str) -> tuple[Storage | None, Finding]:
    try:
        storage = Storage.at(root)
        ask({f"storage {storage.shown}": storage.check_writable})
    except UserError as error:
        return None, Finding("storage", shown(root), "missing", *_told(error))
    kind = "a folder" if storage.is_local else "an object store"
    return storage, Finding("storage", storage.shown, "ok", f"{kind}: a probe was written, read and deleted")


def _tracking(uri: str | None, storage: str) -> tuple[str | None, Finding]:
    from orchestrator.tracking.ping import ping

    try:
        resolved = resolve_tracking_uri(uri, storage)
        ping(resolved)
    except UserError as error:
        return None, Finding("mlflow", shown(uri or "MLflow"), "missing", *_told(error))
    path = sqlite_path(resolved)
    fresh = path is not None and not path.exists()
    return resolved, Finding("mlflow", shown(resolved), "ok", "created by the first sweep" if fresh else "reachable")


def _ray(address: str | None, storage: Storage | None, tracking_uri: str | None) -> Iterator[Finding]:
    from orchestrator.cluster import preflight
    from orchestrator.cluster.connect import connect

    try:
        if address is None:
            seconds = preflight.can_start(1)
            yield Finding("ray", "local", "ok", f"starts, and ran a task in {seconds:.1f} s")
            return
        connect(address, 1)
    except UserError as error:
        yield Finding("ray", address or "local", "missing", *_told(error))
        return
    nodes = preflight.nodes()
    for node in nodes:
        resources = ", ".join(f"{amount:g} {name}" for name, amount in sorted(node.resources.items())) or "nothing"
        yield Finding("ray", str(node), "ok", resources)
    if storage is None:
        return
    if len(nodes) > 1 and tracking_uri is not None and tracking_uri.startswith("sqlite:"):
        remedy = "start `mlflow server` on one node and give its address with --tracking-uri"
        yield Finding("mlflow", tracking_uri, "missing", f"a file, but the cluster has {len(nodes)} nodes", remedy)
        tracking_uri = None
    for node, problems in preflight.survey(storage, tracking_uri, nodes):
        if not problems:
            parts = "storage" if tracking_uri is None else "storage and MLflow"
            yield Finding("ray", f"from {node}", "ok", f"{parts} can be used")
        for problem in problems:
            yield Finding("ray", f"from {node}", "missing", *_told(problem))


def _told(error: Exception) -> tuple[str, str]:
    """Split an error message into problem and remedy: messages end with '; remedy'."""
    problem, semicolon, remedy = str(error).rpartition("; ")
    return (problem, remedy) if semicolon else (remedy, "")


def table(findings: list[Finding]) -> Table:
    """The findings as a table for the terminal."""
    output = Table(box=None, pad_edge=False)
    for header in ("", "", "", "found", "what to do"):
        output.add_column(header, overflow="fold")
    style = {"ok": "green", "optional": "yellow", "missing": "bold red"}
    label = {"ok": "OK", "optional": "optional", "missing": "MISSING"}
    part = ""
    for finding in findings:
        output.add_row(
            f"[{style[finding.state]}]{label[finding.state]}[/]",
            finding.part if finding.part != part else "",
            *(escape(text) for text in (finding.name, finding.found, finding.remedy)),
        )
        part = finding.part
    return output


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """The findings for ``--json``."""
    return {"works": works(findings), "findings": [asdict(finding) for finding in findings]}
