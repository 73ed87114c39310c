"""The tracking URI, the address of MLflow's store, and the file of a SQLite store. Needs no MLflow."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from orchestrator.errors import ConfigError, UserError
from orchestrator.files import absolute
from orchestrator.storage import local_root
from orchestrator.uris import shown

SQLITE = "sqlite:///"

FILE_SECONDS = 4.0
"""Time limit for the lock of a SQLite store."""


def unusable(uri: str, reason: str) -> UserError:
    """The error about a store that cannot be used."""
    return UserError(f"MLflow at {shown(uri)} cannot be used: {reason}; check --tracking-uri")


def resolve_tracking_uri(uri: str | None, storage: str) -> str:
    """The tracking URI in absolute form, since trials run in other working directories.

    Args:
        uri: The user's URI or path; None for a SQLite store beside the data.
        storage: Storage root.

    Raises:
        ConfigError: ``uri`` is None and the storage is remote, where a SQLite store can neither be kept nor shared; or
            it is empty.
    """
    if uri is None:
        root = local_root(storage)
        if root is None:
            raise ConfigError(
                f"storage {shown(storage)!r} is remote, and MLflow's SQLite store cannot be kept there; give "
                f"--tracking-uri, e.g. http://head:5000 of an `mlflow server`"
            )
        return sqlite_uri(Path(root) / "mlflow.db")
    try:
        if not uri.startswith(SQLITE):
            return uri if ":" in uri else absolute(uri).replace("%", "%25")  # MLflow decodes a path, too
        path, question, options = uri.removeprefix(SQLITE).partition("?")
        return uri if path.startswith("/") else sqlite_uri(Path(absolute(unquote(path)))) + question + options
    except ValueError as error:
        raise ConfigError(f"tracking URI {error}") from None


def sqlite_uri(path: Path) -> str:
    """The tracking URI of a SQLite file. '%' and '?' in the path mean themselves."""
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def check_file(uri: str, path: Path) -> None:
    """Check that the file of a SQLite store is a database, if it exists. Needs no MLflow.

    Raises:
        UserError: It is not, or it cannot be read.
    """
    if path.exists():  # the first command creates it; opening it here would create it too early
        try:
            with closing(sqlite3.connect(path, timeout=FILE_SECONDS)) as database:
                database.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise unusable(uri, str(error)) from error
