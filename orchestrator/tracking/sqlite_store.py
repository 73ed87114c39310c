"""MLflow's SQLite store: its creation, and paths whose names MLflow would take for something else."""

from __future__ import annotations

import threading
from pathlib import Path

from orchestrator.tracking.uri import sqlite_path

creating = threading.Lock()
"""Held while a SQLite store is created: MLflow's migrations keep their connection in a global of the process."""


def decode_folders(uri: str) -> None:
    """Make MLflow decode the URI of a SQLite store, as SQLAlchemy does, when it makes the folder of the file.

    Otherwise it makes another folder, with %25 in its name, if the path has '%'.
    """
    if sqlite_path(uri) is not None:
        from mlflow.store.db import utils

        utils._make_parent_dirs_if_sqlite = _make_folder


def _make_folder(uri: str) -> None:
    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


def create_store(uri: str, path: Path) -> None:
    """Create a SQLite store, with an artifact folder beside it.

    MLflow's client takes a folder in the current one, and fails if its name has characters with a meaning in SQL.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    decode_folders(uri)
    SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri()).engine.dispose()
