"""Plugins by module name: ``family: euler`` in a configuration refers to ``solvers/families/euler.py``.

A new plugin is a new file in the right folder that defines one module-level name; plugins are not registered.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator.errors import ConfigError


class Kind(NamedTuple):
    """Package of the plugins of one kind, and the module-level name that each defines.

    Attributes:
        package: The package; its public modules are the plugins, except ``base`` and those in ``others``.
        attribute: The module-level name.
        noun: Term for a plugin of this kind in error messages.
        others: Public modules of the package that are not plugins.
    """

    package: str
    attribute: str
    noun: str
    others: tuple[str, ...] = ()


KINDS = {
    "families": Kind("solvers.families", "FAMILY", "solver family"),
    "methods": Kind("solvers.distil.methods", "METHOD", "distillation method"),
    "schedulers": Kind("solvers.schedulers", "SCHEDULER", "scheduler"),
    "models": Kind("orchestrator.models", "ADAPTER", "model adapter", ("decoders", "facts")),
    "datasets": Kind("orchestrator.datasets", "DATASET", "dataset"),
    "metrics": Kind("orchestrator.metrics", "METRIC", "metric", ("measurements",)),
    "features": Kind("orchestrator.features", "EXTRACTOR", "feature extractor", ("moments",)),
    "objectives": Kind("orchestrator.objectives", "OBJECTIVE", "objective"),
    "decoders": Kind("orchestrator.models.decoders", "DECODER", "decoder"),
    "recognisers": Kind("orchestrator.audio.recognisers", "RECOGNISER", "recogniser"),
    "speaker_encoders": Kind("orchestrator.audio.speaker_encoders", "ENCODER", "speaker encoder"),
    "exporters": Kind("orchestrator.export", "EXPORTER", "exporter", ("ns_scheduler",)),
}


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind, sorted."""
    package = importlib.import_module(KINDS[kind].package)
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    others = ("base", *KINDS[kind].others)
    return sorted(name for name in modules if name not in others and not name.startswith("_"))


def load(kind: str, name: str) -> Any:
    """The plugin ``name`` of a kind.

    Raises:
        ConfigError: Unknown plugin; the message lists those that exist.
    """
    noun = KINDS[kind].noun
    known = names(kind)
    if name not in known:
        raise ConfigError(f"unknown {noun} {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    module = importlib.import_module(f"{KINDS[kind].package}.{name}")
    return getattr(module, KINDS[kind].attribute)


def build(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build the plugin ``name`` with ``options`` as its dataclass fields.

    Raises:
        ConfigError: Unknown plugin, unknown option (the message lists the valid ones), or a value the plugin rejects.
    """
    factory = load(kind, name)
    options = dict(options or {})
    known = [f.name for f in dataclasses.fields(factory) if f.init]
    noun = KINDS[kind].noun
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"{noun} {name!r} has no option {option!r}{did_you_mean(option, known)}; its options are: {listed}"
            )
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{noun} {name!r}: {error}") from error


def describe(kind: str, plugin: Any) -> dict[str, Any]:
    """The name and options from which :func:`build` makes an equal plugin."""
    name = type(plugin).__module__.removeprefix(f"{KINDS[kind].package}.")
    options = {f.name: getattr(plugin, f.name) for f in dataclasses.fields(plugin) if f.init}
    return {"name": name, "options": options}


def every(kind: str) -> Iterator[tuple[str, Any]]:
    """Iterate over all plugins of a kind, as (name, plugin)."""
    for name in names(kind):
        yield name, load(kind, name)


def did_you_mean(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
