"""Output of ``bespoke list``: plugins and all their options, from the code."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from orchestrator import plugins
from orchestrator.metrics.base import PairMetric
from solvers.families import Family


def describe(kind: str) -> Iterator[str]:
    """Each plugin of a kind: a line, and one per option; families and metrics also their facts."""
    entries = list(plugins.every(kind))
    width = max(len(name) for name, _ in entries) + 1
    if kind == "families":
        yield f"{'':<{width}} {'order':>7} {'eval/step':>9}"
    if kind == "metrics":
        yield f"{'':<{width}} {'samples':>7} {'in sweeps':>9}"
    for name, plugin in entries:
        yield f"{name:<{width}} {_facts(kind, plugin)}{first_sentence(plugin)}{_source(plugin)}"
        for option in plugins.options_of_plugin(plugin):
            yield f"    {_head(option)}{': ' if option.description else ''}{option.summary * bool(option.description)}"
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


def _head(option: plugins.Option) -> str:
    """Name, type and default of an option."""
    return f"{option.name} ({option.allowed}; {'required' if option.required else f'default {option.default}'})"


def describe_one(kind: str, name: str) -> Iterator[str]:
    """One plugin in full: its docstring, and the whole text of each option.

    Raises:
        ConfigError: No plugin has this name.
    """
    plugin = plugins.load(kind, name)
    described, _, _ = (inspect.getdoc(plugin) or "").partition("\n\nAttributes:")
    yield f"{plugins.KINDS[kind].noun} {name}{_source(plugin)}"
    yield ""
    yield described
    options = plugins.options_of_plugin(plugin)
    yield ""
    yield "Options:" if options else "No options."
    for option in options:
        yield f"  {_head(option)}"
        if option.description:
            yield textwrap.fill(option.description, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def as_data(kind: str, name: str | None = None) -> list[dict[str, Any]]:
    """The plugins of a kind, or one of them, as data for JSON."""
    entries = list(plugins.every(kind)) if name is None else [(name, plugins.load(kind, name))]
    return [
        {
            "name": entry,
            "summary": first_sentence(plugin),
            "options": [
                {
                    "name": option.name,
                    "type": option.allowed,
                    "required": option.required,
                    "default": None if option.default is None else json.loads(option.default),
                    "description": option.description,
                }
                for option in plugins.options_of_plugin(plugin)
            ],
        }
        for entry, plugin in entries
    ]
