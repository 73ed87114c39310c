"""Families by module name, for families that wrap another one named by an option."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from solvers.families.base import Family


def named_family(name: str, options: Mapping[str, Any]) -> Family:
    """The fixed family of module ``solvers.families.<name>``, built with ``options``.

    Raises:
        ValueError: The family does not exist, is learnable, or rejects the options.
    """
    package = importlib.import_module("solvers.families")
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    family = getattr(importlib.import_module(f"solvers.families.{name}"), "FAMILY", None) if name in names else None
    if family is None:
        raise ValueError(f"there is no solver family {name!r}; `bespoke list families` shows those that exist")
    if family.learnable:
        raise ValueError(
            f"family {name!r} is learned itself and cannot be wrapped; name a fixed one such as 'midpoint'"
        )
    try:
        built: Family = family(**options)
    except TypeError as error:
        raise ValueError(f"family {name!r} refuses the options {dict(options)}: {error}") from error
    return built
