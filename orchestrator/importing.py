"""Import of the user's own classes and functions by their import path, from folders that need not be installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import RAISED, describe

STARTED_WITH = tuple(sys.path)
"""The import path of this process before any folder of a model was added to it."""


def import_factory(given: Any, folders: str | Sequence[str] | None, option: str = "factory") -> Callable[..., Any]:
    """Import the class or function at ``"package.module:name"``.

    Args:
        given: The import path.
        folders: Folder of a module that is not installed, or several. They are put at the front of ``sys.path`` and
            stay there, because a network may import neighbouring modules when it first runs.
        option: Name of the option that holds the import path, for error messages.

    Raises:
        ValueError: The import path is malformed, cannot be imported, or resolves to a module outside the folders; the
            message names the remedy.
    """
    module_name, colon, name = str(given).partition(":")
    if not (isinstance(given, str) and module_name and colon and name):
        raise ValueError(f"{option}={given!r} does not name a class or function; write it as 'package.module:name'")
    roots = find_modules_in(folders)
    try:
        module = importlib.import_module(module_name)
    except RAISED as error:  # importing a user module may raise anything
        hint = f"path {_shown(roots)} was searched too" if roots else "set path to the folder that holds it"
        raise ValueError(f"{option}={given!r} cannot be imported ({describe(error, called=True)}); {hint}") from error
    origin = getattr(module, "__file__", None)
    if roots and not (origin and any(Path(origin).resolve().is_relative_to(root.resolve()) for root in roots)):
        raise ValueError(
            f"{option}={given!r} is imported from {origin}, not from path {_shown(roots)}: another module has the same "
            f"name; rename yours, or remove path"
        )
    factory = getattr(module, name, None)
    if not callable(factory):
        missing = f"{name!r}" if factory is None else f"class or function {name!r}, only {type(factory).__name__}"
        raise ValueError(f"{option}={given!r}: the module {module_name!r} has no {missing}")
    return factory


def find_modules_in(folders: str | Sequence[str] | None) -> list[Path]:
    """Make the modules in folders importable, the first folder's first, and return the absolute paths.

    Raises:
        ValueError: A folder does not exist, or the value does not name folders.
    """
    names = [] if folders is None else [folders] if isinstance(folders, str) else folders
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"path must be a folder or a list of folders, got {folders!r}")
    roots = [Path(name).expanduser().absolute() for name in names]
    for root in reversed(roots):
        if not root.is_dir():
            raise ValueError(f"path: there is no folder {root}; every machine that runs a host needs it there")
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return roots


def _shown(roots: list[Path]) -> str:
    return " and ".join(map(str, roots))
