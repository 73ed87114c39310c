"""Plugins by module name: ``family: euler`` in a configuration refers to ``solvers/families/euler.py``.

A new plugin is a new file in the right folder that defines one module-level name; plugins are not registered.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import ConfigError
from orchestrator.files import absolute


class Kind(NamedTuple):
    """Package of the plugins of one kind, and the module-level name that each defines.

    Attributes:
        package: The package; its public modules are the plugins, except ``base`` and those in ``others``.
        attribute: The module-level name.
        noun: Term for a plugin of this kind in error messages.
        others: Public modules of the package that are not plugins.
        unlisted: Plugins that code chooses and a configuration cannot: no list of names has them.
    """

    package: str
    attribute: str
    noun: str
    others: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


KINDS = {
    "families": Kind("solvers.families", "FAMILY", "solver family"),
    "methods": Kind("solvers.distil.methods", "METHOD", "distillation method"),
    "schedulers": Kind("solvers.schedulers", "SCHEDULER", "scheduler"),
    "models": Kind(
        "orchestrator.models", "ADAPTER", "model adapter", ("decoders", "facts", "kinds"), ("built", "in_process")
    ),
    "datasets": Kind("orchestrator.datasets", "DATASET", "dataset"),
    "metrics": Kind("orchestrator.metrics", "METRIC", "metric", ("measurements",)),
    "features": Kind("orchestrator.features", "EXTRACTOR", "feature extractor", ("moments",)),
    "objectives": Kind("orchestrator.objectives", "OBJECTIVE", "objective"),
    "decoders": Kind("orchestrator.models.decoders", "DECODER", "decoder"),
    "recognisers": Kind("orchestrator.audio.recognisers", "RECOGNISER", "recogniser"),
    "speaker_encoders": Kind("orchestrator.audio.speaker_encoders", "ENCODER", "speaker encoder"),
    "exporters": Kind("orchestrator.export", "EXPORTER", "exporter", ("ns_scheduler", "beginnings")),
}


PATH = {"is_path": lambda value: True}
"""Metadata of a field (an option) that names a file or folder."""

FOLDER_OR_NAME = {"is_path": lambda value: os.path.isdir(os.path.expanduser(value))}
"""Metadata of a field that names a folder, or a repository on the Hugging Face hub."""

FILE_OR_NAME = {"is_path": lambda value: Path(value).suffix in (".safetensors", ".npz")}
"""Metadata of a field that names a file of weights or statistics, or one that ships with the package."""


def options_of(kind: str, name: str | None = None) -> dict[str, Any]:
    """Metadata of a field with the options of another plugin.

    Args:
        kind: The other plugin's kind.
        name: The field with its name; None if the field's own value is ``{name: ..., options: {...}}``.
    """
    return {"kind": kind, "name": name}


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind that a configuration can choose, sorted."""
    package = importlib.import_module(KINDS[kind].package)
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    others = ("base", *KINDS[kind].others, *KINDS[kind].unlisted)
    return sorted(name for name in modules if name not in others and not name.startswith("_"))


def load(kind: str, name: str) -> Any:
    """The plugin ``name`` of a kind.

    Raises:
        ConfigError: Unknown plugin; the message lists those that exist.
    """
    noun = KINDS[kind].noun
    known = names(kind)
    if name not in (*known, *KINDS[kind].unlisted):
        raise ConfigError(f"unknown {noun} {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    module = importlib.import_module(f"{KINDS[kind].package}.{name}")
    return getattr(module, KINDS[kind].attribute)


def build(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build the plugin ``name`` with ``options`` as its dataclass fields.

    Raises:
        ConfigError: Unknown plugin, unknown option (the message lists the valid ones), or a value the plugin rejects.
    """
    options = dict(options or {})
    check_options(kind, name, options)
    try:
        return load(kind, name)(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{KINDS[kind].noun} {name!r}: {error}") from error


def check_options(kind: str, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that plugin ``name`` does not have, values of another type, and options that are missing.

    All unknown and all missing options are named at once. Types of a model adapter's options are left to
    ``ModelAdapter.check``, which knows what each is for.

    Raises:
        ConfigError: Names the options, their values and what is allowed or needed.
    """
    factory, noun = load(kind, name), KINDS[kind].noun
    known = {option.name: option for option in options_of_plugin(factory)}
    problems = []
    if unknown := [option for option in options if option not in known]:
        named = ", ".join(f"{option!r}{did_you_mean(str(option), list(known))}" for option in unknown)
        listed = ", ".join(known) or "none"
        problems.append(f"has no option{'s' * (len(unknown) > 1)} {named}; its options are: {listed}")
    if missing := [option for option in known.values() if option.required and option.name not in options]:
        each = "; ".join(f"{option.name}: {option.summary}" for option in missing)
        problems.append(f"needs {', '.join(option.name for option in missing)}. {each}")
    if problems:
        raise ConfigError(f"{noun} {name!r} {'; it '.join(problems)}")
    for option, value in options.items():
        if kind != "models" and (problem := type_problem(factory, option, value)) is not None:
            raise ConfigError(f"{noun} {name!r}: {problem}")


class Option(NamedTuple):
    """An option of a plugin: a field of its dataclass, its own or an inherited one.

    Attributes:
        name: Name in a configuration.
        allowed: What its value may be, in words.
        default: The default as in YAML; None if it is required.
        description: Text of the docstring's section Attributes; empty if it has none.
    """

    name: str
    allowed: str
    default: str | None
    description: str

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is None

    @property
    def summary(self) -> str:
        """The description's first sentence, or what the value may be."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.description)[0].rstrip(".;") or self.allowed


def options_of_plugin(factory: Any) -> list[Option]:
    """The options of a plugin: those without a default first, else in the order of their definition."""
    described: dict[str, str] = {}
    for owner in reversed(factory.__mro__):
        described |= _attributes(owner)
    options = [
        Option(
            name=field.name,
            allowed=_in_words(_types(factory).get(field.name, Any)),
            default=_default(field),
            description=described.get(field.name, ""),
        )
        for field in dataclasses.fields(factory)
        if field.init
    ]
    return sorted(options, key=lambda option: not option.required)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default, default=str)
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory(), default=str)
    return None


def _attributes(owner: type) -> dict[str, str]:
    """The texts of a class docstring's section Attributes, by name."""
    lines = inspect.cleandoc(owner.__dict__.get("__doc__") or "").splitlines()
    section = lines[lines.index("Attributes:") + 1 :] if "Attributes:" in lines else []
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section:
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 8):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return texts


def type_problem(factory: Any, option: str, value: Any) -> str | None:
    """What is wrong with the type of a value for a dataclass's field, with what is allowed; None if nothing is."""
    hint = _types(factory).get(option, Any)
    if _fits(value, hint):
        return None
    allowed = _in_words(hint)
    inside = value if isinstance(value, list | tuple) else [value]
    quotes = ""
    if "text" in allowed and any(isinstance(item, bool | int | float) for item in inside):
        quotes = "; put a text that YAML reads as a number or as true or false in quotes"
    return f"{option} must be {allowed}, got {value!r}{quotes}"


@functools.cache
def _types(factory: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; empty if some are imported for type checkers only."""
    try:
        return typing.get_type_hints(factory)
    except NameError:
        return {}


NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, where lists stand for tuples, as in YAML; types that YAML lacks fit every value."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple and ... in parts:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint in NUMBERS:
        finite = not isinstance(value, float) or math.isfinite(value)
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool) and finite
    return isinstance(value, hint) if hint in (bool, types.NoneType) else True


def _in_words(hint: Any, several: bool = False) -> str:
    """What :func:`_fits` accepts, for error messages."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part, several) for part in parts)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (tuple, list) and parts:
        return f"{'lists' if several else 'a list'} of {_in_words(parts[0], several=True)}"
    if origin in (dict, Mapping):
        return "a mapping"
    if hint is Any:
        return "any value" if not several else "values"
    one, more = WORDS.get(hint, ("another kind of value", "other values"))
    return more if several else one


WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
    types.NoneType: ("null", "null"),
}


def located(kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plugin with absolute paths, those of the plugins in its options as well.

    Other processes work in other folders, on a cluster also the hosts. Relative paths, and ``~``, are those of this
    process. What is not valid is left to :func:`build`.

    Args:
        kind, name: The plugin.
        options: Its options; a default that is a relative path is added.

    Raises:
        ConfigError: A path is empty.
    """
    located_options = dict(options)
    if name not in names(kind):
        return located_options
    defaults = {option.name: option.default for option in dataclasses.fields(load(kind, name))}
    for option in dataclasses.fields(load(kind, name)):
        value = options.get(option.name, option.default)
        if "is_path" in option.metadata and isinstance(value, str | list):
            values = [value] if isinstance(value, str) else value
            if not all(isinstance(item, str) for item in values):
                continue
            try:
                paths = [absolute(item) for item in values]
            except ValueError as error:
                raise ConfigError(f"option {option.name!r} of {KINDS[kind].noun} {name!r} {error}") from None
            if isinstance(value, list):
                located_options[option.name] = paths
            elif option.metadata["is_path"](value):
                located_options[option.name] = paths[0]
        elif isinstance(value, Mapping) and "kind" in option.metadata:
            naming = option.metadata["name"]
            other = None if naming is None else options.get(naming, defaults[naming])
            located_options[option.name] = _located_inside(option.metadata["kind"], other, value)
    return located_options


def _located_inside(kind: str, name: Any, value: Mapping[str, Any]) -> Any:
    """The options of a plugin in an option of another; without ``name``, the value is ``{name: ..., options: ...}``."""
    if name is not None:
        return located(kind, str(name), value)
    if not isinstance(value.get("name"), str) or not isinstance(value.get("options", {}), Mapping):
        return value
    return {**value, "options": located(kind, value["name"], value.get("options", {}))}


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
