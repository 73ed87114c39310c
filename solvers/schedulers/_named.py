"""Builds schedulers by module name, for families whose target path is an option."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from solvers.schedulers.base import Scheduler


def named_scheduler(name: str, options: Mapping[str, Any]) -> Scheduler:
    """The scheduler of module ``solvers.schedulers.<name>``, built with ``options``.

    Raises:
        ValueError: The scheduler does not exist, or does not accept the options.
    """
    package = importlib.import_module("solvers.schedulers")
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    plugin = (
        getattr(importlib.import_module(f"solvers.schedulers.{name}"), "SCHEDULER", None) if name in names else None
    )
    if plugin is None:
        raise ValueError(f"there is no scheduler {name!r}; `bespoke list schedulers` shows those that exist")
    try:
        built: Scheduler = plugin(**options)
    except TypeError as error:
        raise ValueError(f"scheduler {name!r} refuses the options {dict(options)}: {error}") from error
    return built
