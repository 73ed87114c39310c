"""Loads a cluster file and runs Ray's own validation on it."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.cluster.check.reading import Problem, mapping


def load(path: Path) -> dict[str, Any] | Problem:
    """The content of a cluster file, or the problem that prevents reading it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Problem(str(path), "there is no such file", "Give the path of a `ray up` cluster file")
    except (OSError, UnicodeDecodeError) as error:
        return Problem(str(path), f"the file cannot be read: {error}", "Give the path of a readable YAML file")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return Problem(str(path), f"the file is not YAML: {reason}", "Fix the reported line")
    if not isinstance(loaded, dict):
        kind = "empty" if loaded is None else f"a {type(loaded).__name__}"
        return Problem(
            str(path),
            f"a cluster file is a mapping of keys to values, this one is {kind}",
            "Start from ray_cluster.yaml",
        )
    return loaded


def ray_problems(raw: dict[str, Any], *, head_type_is_known_bad: bool) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Run Ray's validation. Returns the file with Ray's defaults filled in (None if impossible), and the problems."""
    # Imported here because importing Ray is slow and nothing else in this module needs it. The two functions are
    # private to Ray, but no public one validates a file without calling the cloud.
    try:
        from jsonschema import ValidationError  # type: ignore[import-untyped]
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        problem = Problem(
            "ray", f"Ray's validation is not installed: {error}", "Install it: pip install 'ray[default]'"
        )
        return None, [problem]

    try:
        # Ray prints warnings about Docker even if the file does not use it.
        with contextlib.redirect_stdout(io.StringIO()):
            prepared = prepare_config(raw)
    except Exception as error:  # Ray does not catch what a malformed file causes: KeyError, TypeError, …
        if isinstance(error, KeyError) and error.args == ("head_node_type",) and head_type_is_known_bad:
            return None, []
        what = f"the key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        return None, [Problem("Ray's validation", what, "Compare the file with ray_cluster.yaml")]
    try:
        validate_config(prepared)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "top level"
        return prepared, [Problem(where, error.message, _schema_remedy(error))]
    except Exception as error:  # as above, and ValueError for rules beyond the schema
        if "head_node_type" in str(error) and head_type_is_known_bad:
            return prepared, []
        return prepared, [Problem("Ray's validation", str(error).rstrip("."), "Change the file accordingly")]
    return prepared, []


def _schema_remedy(error: Any) -> str:
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = [key for key in error.instance if key not in known]
        nearest = [match for key in unknown for match in difflib.get_close_matches(key, known, n=1)]
        if nearest:
            return f"Did you mean {', '.join(nearest)}?"
        return f"Use one of {', '.join(sorted(known))}"
    if error.validator == "required":
        return "Add the missing key"
    return f"Give it a value of type {error.validator_value}" if error.validator == "type" else "Change the value"


def head_type_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    if "available_node_types" not in raw:
        yield Problem(
            "available_node_types",
            "no node type is declared, so Ray would start its own default machines",
            "Declare a head and at least one worker type, as ray_cluster.yaml does",
        )
        return
    names = list(mapping(raw["available_node_types"]))
    head = raw.get("head_node_type")
    if head not in names:
        what = "is missing" if head is None else f"is {head!r}, which is not a node type"
        yield Problem("head_node_type", f"the head's type {what}", f"Name one of available_node_types: {names}")
