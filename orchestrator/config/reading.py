"""Reads configurations: YAML, variants, ``key=value`` overrides, and error messages in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.errors import ConfigError
from orchestrator.files import read_text

M = TypeVar("M", bound=BaseModel)

RENAMED = {"resources.merge": "resources.batch_runs"}
"""Keys of earlier releases and their current names, for the error about an old key."""


KEY = re.compile(r"[^\s.=]+(\.[^\s.=]+)*")
"""A dotted key."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read and check an experiment.

    Args:
        path: A YAML file.
        overrides: ``key=value`` with dotted keys, e.g. ``pairs.train=64`` or ``nfe=[4,8]``; values are YAML.

    Raises:
        ConfigError: The configuration is invalid; names the key, the value and the remedy.
    """
    config = parse_config(read_yaml(path, overrides), str(path))
    config.check()
    return config


def parse_config(content: dict[str, Any], origin: str) -> ExperimentConfig:
    """Validate keys and types of a configuration. :meth:`ExperimentConfig.check` validates the rest."""
    return validated(ExperimentConfig, content, origin)


def validated(model: type[M], content: dict[str, Any], origin: str) -> M:
    """``content`` as a ``model``; a single :class:`ConfigError` lists all problems."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        details = error.errors()
        locations = [detail["loc"] for detail in details]
        # For a list with an invalid item, pydantic also reports that the list is too short: keep the item's error only.
        kept = [
            d
            for d in details
            if not any(len(at) > len(d["loc"]) and at[: len(d["loc"])] == d["loc"] for at in locations)
        ]
        problems = "\n  ".join(_explain(detail, model) for detail in kept)
        raise ConfigError(f"{origin} is not a valid configuration:\n  {problems}") from error


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with ``key=value`` overrides applied.

    A file may hold ``variants``, named mappings of overrides. ``variant=NAME`` applies one before the other overrides.

    Raises:
        ConfigError: The file does not exist or is not a YAML mapping, an override is not ``key=value``, or the variant
            is unknown.
    """
    source = Path(path)
    if not source.is_file():
        raise ConfigError(f"no configuration at {source}; the bundled ones are in sweeps/configs")
    try:
        content = parse_yaml(read_text(source))
    except ValueError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must be a mapping of keys to values, got {type(content).__name__}")
    variants = content.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise ConfigError(f"variants of {source} must map names to overrides, {{full: {{nfe: [8]}}}}, got {variants!r}")
    variants = {str(name): values for name, values in variants.items()}
    names = [override.partition("=")[2] for override in overrides if override.startswith("variant=")]
    for name in names:
        if name not in variants:
            listed = ", ".join(variants) or "none"
            raise ConfigError(
                f"{source} has no variant {name!r}{plugins.did_you_mean(name, list(variants))}; it has: {listed}"
            )
        for key, value in variants[name].items():
            _set(content, str(key), value, f"{key} of variant {name}")
    for override in overrides:
        if not override.startswith("variant="):
            _apply(content, override)
    return content


def parse_options(options: Sequence[str], content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parse ``key=value`` strings with dotted keys into a mapping; values are YAML.

    Args:
        options: The strings.
        content: Mapping that they change; None: an empty one.

    Raises:
        ConfigError: An option is not ``key=value``.
    """
    content = {} if content is None else content
    for option in options:
        _apply(content, option)
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise ConfigError(f"override {override!r} is not key=value, e.g. pairs.train=64, without spaces")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from error
    _set(content, key, value, override)


def _set(content: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set a dotted key. ``override`` names it in error messages."""
    *parents, last = key.split(".")
    target: Any = content
    for part in parents:
        target = _step(target, part, override)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a mapping")


def _step(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if isinstance(target, dict):
        if not isinstance(target.get(part), dict | list):
            target[part] = {}
        return target[part]
    raise ConfigError(f"override {override!r}: {part!r} is inside a plain value")


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(target):
        raise ConfigError(f"override {override!r}: {part!r} is not an index of a list of {len(target)}")
    return int(part)


def _explain(problem: Any, model: type[BaseModel]) -> str:
    """One line that explains one of pydantic's errors."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden" and where in RENAMED:
        return f"{where}: this key is now called {RENAMED[where]}; rename it"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        name = str(problem["loc"][-1])
        hint = plugins.did_you_mean(name, known) or _whole_key(where, model)
        return f"{where}: unknown key{hint}; known here: {', '.join(sorted(known))}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    remedy = ""
    if problem["input"] is None:
        remedy = "; give it a value, or remove the key"
    elif problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
        remedy = "; put a text that YAML reads as a number or as true or false in quotes"
    return f"{where}: {message} (got {problem['input']!r}){remedy}"


def _whole_key(where: str, model: type[BaseModel]) -> str:
    """A hint for a key without its section (``train``), or written as an environment variable (``PAIRS_TRAIN``)."""
    wanted = re.sub(r"[^a-z0-9]", "", where.lower())
    for key in _dotted(model):
        if wanted in (key.replace(".", "").replace("_", ""), key.rpartition(".")[2].replace("_", "")):
            return f" (did you mean {key!r}?)"
    return ""


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration's sections, with dots."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """Field names of the section at the location of a pydantic error."""
    current: type[BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        section = _model_inside(field.annotation)
        if section is not None:
            current = section
    return list(current.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        model = _model_inside(argument)
        if model is not None:
            return model
    return None
