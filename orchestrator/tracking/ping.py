"""Asks within seconds whether an MLflow store can be used. MLflow's own client would try for minutes, in silence."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from alembic.util.exc import CommandError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests.utils import get_environ_proxies
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.errors import UserError
from orchestrator.outside import ask
from orchestrator.tracking.uri import check_file, sqlite_path, unusable
from orchestrator.uris import shown

STORE_ERRORS = (MlflowException, SQLAlchemyError, CommandError, OSError)
"""What MLflow raises if a store cannot be used; CommandError: a database of another program or version."""

PING_SECONDS = 4.0
"""Time limit for a connection to a server; for its answer, twice as long."""


def ping(uri: str) -> None:
    """Check within seconds that the tracking store answers a request. A missing SQLite file is not an error.

    Raises:
        UserError: The store cannot be used; names the address, the reason and the remedy.
    """
    path = sqlite_path(uri)
    if path is None:
        ask({f"MLflow at {shown(uri)}": lambda: _ask_server(uri)})
    else:
        check_file(uri, path)


def _ask_server(uri: str) -> None:
    if urlsplit(uri).scheme not in ("http", "https"):
        try:
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        except (*STORE_ERRORS, ImportError) as error:
            raise unusable(uri, str(error)) from error
        return
    try:
        parts = urlsplit(uri)
        if not get_environ_proxies(uri):  # the reason is shorter than MLflow's
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=PING_SECONDS).close()
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            max_retries=0,
            timeout=2 * PING_SECONDS,
            raise_on_status=False,
            json={"max_results": 1},
        )
        content = response.json() if response.ok else None
    except (MlflowException, OSError, ValueError) as error:
        silent = "Timeout" in str(error) or isinstance(error, TimeoutError)
        raise unusable(uri, "no answer in time" if silent else str(error)) from error
    status = f"it answers HTTP {response.status_code} {response.reason}"
    if response.status_code in (401, 403):
        raise UserError(
            f"MLflow at {shown(uri)} cannot be used: {status} ({_beginning(response.text)}); set user and password in "
            f"--tracking-uri, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; the "
            f"server may also have to list this address in its --allowed-hosts"
        )
    if response.status_code >= 500:
        raise UserError(
            f"MLflow at {shown(uri)} cannot be used: {status} ({_beginning(response.text)}); see the server's log"
        )
    if not isinstance(content, dict) or not content.keys() <= {"experiments", "next_page_token"}:
        raise unusable(uri, f"{status}, but not as an MLflow server does")


def _beginning(text: str) -> str:
    return " ".join(text.split())[:100] or "without a reason"
