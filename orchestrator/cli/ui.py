"""The MLflow server behind ``bespoke ui``: where to look in it, and its end together with the command's."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import click

from orchestrator.errors import UserError

START_SECONDS = 60.0
"""How long the server may take to answer before its address is printed all the same."""

STOP_SECONDS = 10.0
"""How long the server may take to end after SIGTERM before it is killed."""


def curves_path(experiment_id: str | None) -> str:
    """Path of an experiment's curves in MLflow's UI; the start page without an experiment.

    Without these parameters, MLflow 3 opens an experiment on its page of traces, which is empty here.
    """
    if experiment_id is None:
        return "/"
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def serve(uri: str, host: str, port: int, path: str) -> int:
    """Run MLflow's server until it ends or this process is interrupted or terminated.

    Args:
        uri: The MLflow store.
        host, port: Where the server listens.
        path: Path of the page to show, from :func:`curves_path`.

    Returns:
        The server's exit status; 0 if it was stopped from here.

    Raises:
        UserError: Nothing can listen there, e.g. because the port is in use.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(
            f"the UI cannot listen on port {port} of {host}: {error.strerror}; choose others with --port and --host"
        ) from error
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port), "--host", host]
    # Neither Python's -m nor the server may import from the current folder, as both do by default.
    installed = find_spec("mlflow").submodule_search_locations[0]  # type: ignore[union-attr, index]  # it is required
    command += ["--uvicorn-opts", shlex.join(["--app-dir", str(Path(installed).parent)])]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    # A session of its own: the server forks workers, and all of them must end with this command.
    server = subprocess.Popen(command, start_new_session=True, env=environment)

    def terminate(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}{path}"
        if _answers(server, host, port):
            click.echo(f"curves of the newest sweep: {address}" if path != "/" else f"MLflow: {address}")
            _open_browser(address)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(server)


def _answers(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until the server listens; False if it ended instead."""
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        time.sleep(0.2)
    return server.poll() is None


def _open_browser(address: str) -> None:
    """Open the address if this is a terminal on a machine with a browser."""
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.name == "nt"):
        with suppress(webbrowser.Error):
            webbrowser.open(address)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
