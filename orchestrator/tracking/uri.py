"""Resolves the tracking URI, the address of MLflow's store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from orchestrator.errors import ConfigError


def resolve_tracking_uri(uri: str | None, storage: str) -> str:
    """The tracking URI in absolute form, since trials run in other working directories.

    Args:
        uri: The user's URI or path; None for a SQLite store beside the data.
        storage: Storage root.

    Raises:
        ConfigError: ``uri`` is None and the storage is remote, where a SQLite store can neither be kept nor shared.
    """
    if uri is not None:
        relative = uri.removeprefix("sqlite:///")
        if uri.startswith("sqlite:///") and not relative.startswith("/"):
            return f"sqlite:///{Path(relative).absolute()}"
        return uri if "://" in uri or ":" in uri else str(Path(uri).absolute())
    root = unquote(storage.removeprefix("file://")) if storage.startswith("file://") else storage
    if "://" in root:
        raise ConfigError(
            f"storage {storage!r} is remote, and MLflow's SQLite store cannot be kept there; give --tracking-uri, e.g. "
            f"http://head:5000 of an `mlflow server`"
        )
    return f"sqlite:///{Path(root).expanduser().absolute() / 'mlflow.db'}"
