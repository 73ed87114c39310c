"""Checks that everything outside this process answers. Imports Ray and MLflow only if they are to be asked."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.outside import ask
from orchestrator.storage import Storage
from orchestrator.tracking.uri import check_file, sqlite_path
from orchestrator.uris import shown


def check_outside(storage: Storage, tracking_uri: str | None, address: str | None) -> None:
    """Check before any work that everything outside this process answers, with one deadline.

    Args:
        storage: Storage of the experiment, which must be writable.
        tracking_uri: MLflow store; None if the command does not use MLflow.
        address: Ray cluster: 'auto' or host:port; None for none, or a local one.

    Raises:
        UserError: One of them does not answer, or cannot be used; names it, the reason and the remedy.
    """
    questions: dict[str, Callable[[], object]] = {f"storage {storage.shown}": storage.check_writable}
    if tracking_uri is not None:
        questions[f"MLflow at {shown(tracking_uri)}"] = _store(tracking_uri)
    if address is not None:
        from orchestrator.cluster.connect import find_cluster  # imports Ray

        questions[f"the Ray cluster at {address!r}"] = lambda: find_cluster(address)
    ask(questions)


def _store(uri: str) -> Callable[[], object]:
    """The question to an MLflow store."""
    path = sqlite_path(uri)
    if path is not None:
        return lambda: check_file(uri, path)
    from orchestrator.tracking.ping import ping  # imports MLflow, which takes seconds: before the deadline begins

    return lambda: ping(uri)
