"""Import of the user's own classes and functions by their import path, from a folder that need not be installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import describe


def import_factory(given: Any, folder: str | None, option: str = "factory") -> Callable[..., Any]:
    """Import the class or function at ``"package.module:name"``.

    Args:
        given: The import path.
        folder: Folder of a module that is not installed. It is put at the front of ``sys.path`` and stays there,
            because a network may import neighbouring modules when it first runs.
        option: Name of the option that holds the import path, for error messages.

    Raises:
        ValueError: The import path is malformed, cannot be imported, or resolves to a module outside the folder; the
            message names the remedy.
    """
    module_name, colon, name = str(given).partition(":")
    if not (isinstance(given, str) and module_name and colon and name):
        raise ValueError(f"{option}={given!r} does not name a class or function; write it as 'package.module:name'")
    root = find_modules_in(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a user module may raise anything
        hint = "set path to the folder that holds it" if root is None else f"path {root} was searched too"
        raise ValueError(f"{option}={given!r} cannot be imported ({describe(error, called=True)}); {hint}") from error
    origin = getattr(module, "__file__", None)
    if root is not None and (origin is None or not Path(origin).resolve().is_relative_to(root.resolve())):
        raise ValueError(
            f"{option}={given!r} is imported from {origin}, not from path {root}: another module has the same name; "
            f"rename yours, or remove path"
        )
    factory = getattr(module, name, None)
    if not callable(factory):
        missing = f"{name!r}" if factory is None else f"class or function {name!r}, only {type(factory).__name__}"
        raise ValueError(f"{option}={given!r}: the module {module_name!r} has no {missing}")
    return factory


def find_modules_in(folder: str | None) -> Path | None:
    """Make the modules in a folder importable, and return its absolute path.

    Raises:
        ValueError: The folder does not exist.
    """
    if folder is None:
        return None
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(f"path: there is no folder {root}; every machine that runs a host needs it there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return root
