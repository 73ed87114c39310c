"""A cluster that is not there is refused within seconds, by address and origin; signals are heard while connecting."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from orchestrator.cluster import connect as module
from orchestrator.cluster.answers import check_outside
from orchestrator.cluster.connect import ALIVE, find_cluster
from orchestrator.errors import PoolError, UserError
from orchestrator.storage import Storage


def test_a_stale_address_of_the_environment_is_refused_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try for a quarter of an hour."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(PoolError, match=r"no Ray cluster at '127\.0\.0\.1:9' \(from RAY_ADDRESS\): .*refused; start"):
        find_cluster("auto")


def test_a_stale_address_in_rays_file_is_refused_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray stop` on another machine, or a crash, leaves the file."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "get_ray_address_from_environment", lambda address, folder: "127.0.0.1:9")
    with pytest.raises(PoolError, match=r"'127\.0\.0\.1:9' \(found by Ray on this machine; its file ray_current"):
        find_cluster("auto")


def test_no_cluster_on_this_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def none(address: str, folder: str | None) -> str:
        raise ConnectionError

    monkeypatch.setattr(module, "get_ray_address_from_environment", none)
    with pytest.raises(PoolError, match="no Ray cluster at 'auto': no Ray runs on this machine, and RAY_ADDRESS"):
        find_cluster("auto")


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:x", "127.0.0.1:99999", "ray://head"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(PoolError, match=f"no Ray cluster at '{address}': "):
        find_cluster(address)


@pytest.mark.parametrize(
    ("code", "accepted"),
    [
        (None, True),
        (grpc.StatusCode.UNAUTHENTICATED, True),  # a head that wants a token
        (grpc.StatusCode.UNIMPLEMENTED, False),  # a node that is not the head, or the port of Ray's clients
    ],
)
def test_what_listens_must_be_the_head_of_a_cluster(code: grpc.StatusCode | None, accepted: bool) -> None:
    """A web server, SSH or a worker node also accept connections."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if details.method != ALIVE or code is grpc.StatusCode.UNIMPLEMENTED:
                return None
            return grpc.unary_unary_rpc_method_handler(answer)

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not None:
            context.abort(code, "")
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Handler()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        if accepted:
            assert find_cluster(address) == (address, repr(address))
        else:
            with pytest.raises(PoolError, match=r"what listens there is not the head of a cluster \(unimplemented\)"):
                find_cluster(address)
    finally:
        server.stop(None)


def test_a_port_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(PoolError, match="is not the head of a cluster"),
    ):
        find_cluster(f"127.0.0.1:{silent.getsockname()[1]}")


def test_everything_outside_is_asked_before_any_work(tmp_path: Path) -> None:
    """The storage first, then MLflow, then Ray; each by its name."""
    good = Storage.at(tmp_path / "data")
    check_outside(good, f"sqlite:///{tmp_path}/data/mlflow.db", None)
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used"):
        check_outside(good, "http://alice:hunter2@127.0.0.1:9", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:9'"):
        check_outside(good, None, "127.0.0.1:9")
    with pytest.raises(UserError, match="storage root /proc/none cannot be written"):
        check_outside(Storage.at("/proc/none"), None, "127.0.0.1:9")


DEAF = """
import ctypes, signal
from orchestrator.cluster.connect import _signals_end_the_process
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: None)  # as Ray does for SIGTERM while it connects
with _signals_end_the_process():
    print("connecting", flush=True)
    ctypes.CDLL(None).pause()  # returns at each signal
    ctypes.CDLL(None).sleep(60)  # in C, without a return to Python in between
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_while_c_code_does_not_return(number: signal.Signals) -> None:
    """Python's handlers run only between two instructions of Python."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"connecting\n"
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.endswith(b"interrupted while connecting to Ray\n")
    assert time.monotonic() - begin < 15


def test_signals_are_pythons_again_afterwards() -> None:
    """Also in a thread, which cannot have handlers."""
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with module._signals_end_the_process():
        pass
    assert signal.set_wakeup_fd(before) == before
    entered = []

    def enter() -> None:
        with module._signals_end_the_process():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["pairs", "sweeps/configs/digits.yaml"], ["doctor", "--json"]])
def test_a_storage_that_is_silent_ends_the_command(repository: Path, command: list[str]) -> None:
    """The storage's library, which goes on trying, does not keep the process alive."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = f"s3://k:hunter2@b/r?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=us-east-1"
        done = subprocess.run(
            [Path(sys.executable).with_name("bespoke"), *command, "--storage", root],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == (1 if "doctor" in command else 2)
    assert "did not answer within 10 s" in " ".join((done.stdout + done.stderr).split())
    assert "hunter2" not in done.stdout + done.stderr
