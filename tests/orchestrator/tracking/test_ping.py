"""A tracking store is asked within seconds, and the error says what answered instead and what to do."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator import outside
from orchestrator.errors import UserError
from orchestrator.tracking import ping as module
from orchestrator.tracking.ping import ping

Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server which answers every request in one way, and returns its address."""
    servers = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST  # noqa: N815 (the base class looks for this name)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://alice:hunter2@127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("body", ["{}", json.dumps({"experiments": [], "next_page_token": "x"})])
def test_a_server_that_answers_as_mlflow_does_is_accepted(serve: Serve, body: str) -> None:
    ping(serve(200, body))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, "You are not authenticated", r"HTTP 401 .*\(You are not authenticated\); set user and password in"),
        (403, "Invalid Host header", r"HTTP 403 .*\(Invalid Host header\); .*MLFLOW_TRACKING_TOKEN; .*--allowed-hosts"),
        (500, "", r"HTTP 500 .*\(without a reason\); see the server's log"),
        (503, "starting", r"HTTP 503 .*\(starting\); see the server's log"),
        (200, "<html>Welcome</html>", r"cannot be used: .*; check --tracking-uri"),
        (200, '{"version": 3}', r"HTTP 200 .*, but not as an MLflow server does; check --tracking-uri"),
        (404, "no such page", r"HTTP 404 .*, but not as an MLflow server does; check --tracking-uri"),
    ],
)
def test_another_answer_is_refused_with_what_to_do(serve: Serve, status: int, body: str, message: str) -> None:
    """At once, without the retries of MLflow's client, and without the password in the address."""
    uri = serve(status, body)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        ping(uri)
    assert time.monotonic() - begin < 3
    assert str(caught.value).startswith(f"MLflow at {uri.replace('alice:hunter2@', '')} cannot be used: ")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and stays silent, or sends so slowly that no single wait is too long."""
    monkeypatch.setattr(module, "PING_SECONDS", 0.1)
    message = r"MLflow at http://127\.0\.0\.1:\d+ cannot be used: no answer in time; check"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match=message):
        ping(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "https://no-such-host.invalid", "http://", "http://x:notaport"])
def test_an_unreachable_address_is_refused(uri: str) -> None:
    """A closed port, an unknown host name, or an invalid address."""
    with pytest.raises(UserError, match=r"cannot be used: .*; check --tracking-uri"):
        ping(uri)


def test_a_missing_sqlite_store_is_not_created(tmp_path: Path) -> None:
    """The first sweep creates it, on the driver."""
    ping(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_sqlite_file_must_be_a_database(tmp_path: Path) -> None:
    """MLflow would retry for a minute and a half."""
    (tmp_path / "mlflow.db").write_text("this text is not a database, despite its file name", encoding="utf-8")
    with pytest.raises(UserError, match="file is not a database; check --tracking-uri"):
        ping(f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "store?%20.db") as database:
        database.execute("CREATE TABLE t (x)")
    ping(f"sqlite:///{tmp_path}/store%3F%2520.db")


def test_all_are_asked_at_once_and_the_silent_one_is_named() -> None:
    """Three that do not answer cost one deadline, not three; a refusal is told rather than a silence after it."""
    forever = threading.Event()

    def refuse() -> None:
        raise UserError("B refuses; do this")

    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^A did not answer within 0\.2 s; check that it is running and can be"):
        outside.ask({"A": forever.wait, "B": forever.wait, "C": forever.wait}, seconds=0.2)
    assert time.monotonic() - begin < 2
    with pytest.raises(UserError, match="B refuses; do this"):
        outside.ask({"A": lambda: None, "B": refuse, "C": forever.wait}, seconds=0.2)
    outside.ask({"A": lambda: None})
    forever.set()
