"""Where MLflow's store is."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from orchestrator.errors import ConfigError


def resolve_tracking_uri(uri: str | None, storage: str) -> str:
    """Where MLflow is, independent of the working directory: trials run in others.

    Args:
        uri: What the user gave, or None for a SQLite store beside the data.
        storage: Storage root.

    Raises:
        ConfigError: None was given, and the storage is remote: a SQLite store cannot be there, nor be shared.
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
