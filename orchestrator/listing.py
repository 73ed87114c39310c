"""What ``bespoke list`` prints: one line a plugin."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from orchestrator import plugins


def describe(kind: str) -> Iterator[str]:
    """Lines for the plugins of one kind: name, options, first sentence; for families also order and evaluations."""
    for name, plugin in plugins.every(kind):
        yield f"{name:<18} {_facts(kind, plugin)}{first_sentence(plugin)}{_options(plugin)}"
    if kind == "models":
        from orchestrator.models.zoo.adapter import zoo_names

        yield ""
        yield "weights that travel with the zoo adapter: " + ", ".join(zoo_names())


def _facts(kind: str, plugin: Any) -> str:
    if kind != "families":
        return ""
    if plugin.learnable:
        return "learned                    "
    family = plugin()
    order = "—" if family.order is None else str(family.order)
    return f"order {order}, {family.evaluations_per_step} eval/step   "


def first_sentence(plugin: Any) -> str:
    """The first line of the plugin's docstring."""
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
