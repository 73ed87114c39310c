"""Output of ``bespoke list``: one line per plugin."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from orchestrator import plugins
from orchestrator.metrics.base import PairMetric
from solvers.families import Family


def describe(kind: str) -> Iterator[str]:
    """One line per plugin of a kind: name, options and first sentence; families and metrics also their facts."""
    entries = list(plugins.every(kind))
    width = max(len(name) for name, _ in entries) + 1
    if kind == "families":
        yield f"{'':<{width}} {'order':>7} {'eval/step':>9}"
    if kind == "metrics":
        yield f"{'':<{width}} {'samples':>7} {'in sweeps':>9}"
    for name, plugin in entries:
        yield f"{name:<{width}} {_facts(kind, plugin)}{first_sentence(plugin)}{_options(plugin)}{_source(plugin)}"
    if kind == "models":
        from orchestrator.models.zoo.adapter import zoo_names

        yield ""
        yield "weights shipped with the zoo adapter: " + ", ".join(zoo_names())


def _facts(kind: str, plugin: Any) -> str:
    if kind == "metrics":
        sees = plugin().sees
        return f"{'any' if sees == 'samples' else sees:>7} {'yes' if issubclass(plugin, PairMetric) else '':>9}  "
    if kind != "families":
        return ""
    if plugin.learnable:
        return f"{'learned':>7} {'':>9}  "
    family = plugin()
    order = "—" if family.order is None else str(family.order)
    return f"{order:>7} {_cost(family):>9}  "


def _cost(family: Family) -> str:
    """Evaluations per step, or the total for N steps ('2N-1') if the last step is cheaper."""
    per_step = family.evaluations_per_step
    for nfe in range(per_step, 0, -1):
        with suppress(ValueError):
            if family.steps(nfe) == 1:
                return str(per_step) if nfe == per_step else f"{per_step}N-{per_step - nfe}"
    return str(per_step)


def _source(plugin: Any) -> str:
    source = getattr(plugin, "source", None)
    return f" ({source})" if isinstance(source, str) else ""


def first_sentence(plugin: Any) -> str:
    """First line of the plugin's docstring."""
    return (inspect.getdoc(plugin) or "").split("\n", 1)[0]


def _options(plugin: Any) -> str:
    if not is_dataclass(plugin):
        return ""
    options = [
        f"{f.name}={f.default!r}" if f.default is not MISSING else f.name
        for f in fields(plugin)
        if f.init and not f.kw_only
    ]
    return f" [{', '.join(options)}]" if options else ""
