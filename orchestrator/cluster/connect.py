"""Connects to a Ray cluster or starts a local one, and checks that a workload fits it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import ray
from ray._private.services import get_ray_address_from_environment

from orchestrator.cluster.surroundings import WorkerPath, ray_folder
from orchestrator.errors import PoolError
from orchestrator.log import debugging
from orchestrator.pool.client import NAMESPACE
from orchestrator.progress import counted

CONNECT_SECONDS = 4.0
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Question to a cluster's head (its GCS)."""

HANDLING_SECONDS = 1.0
"""How long Python may take to handle a signal before the process is ended without it."""


def connect(address: str | None, cpus: int) -> None:
    """Connect to a Ray cluster, or start one on this machine. Does nothing in a process that is already connected.

    Args:
        address: 'auto' or host:port; None starts a local cluster.
        cpus: CPUs of the local cluster.

    Raises:
        PoolError: No cluster listens at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    level = logging.INFO if debugging() else logging.ERROR
    logging.getLogger("ray").setLevel(level)  # before init, which logs its own notices
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": debugging(), "logging_level": level}
    if not address:
        # 'local' is explicit: by default Ray joins the cluster that was last started on this machine.
        folder = ray_folder()
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, job_config=WorkerPath(), _temp_dir=folder, **common
        )
        return
    resolved, described = find_cluster(address)
    try:
        with _signals_end_the_process():
            # A client's workers never import from the current folder.
            path = None if resolved.startswith("ray://") else WorkerPath()
            ray.init(address=resolved, job_config=path, **common)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(described, str(error)) from error


def find_cluster(address: str) -> tuple[str, str]:
    """Find the cluster that an address means, and check within seconds that it is alive; Ray would try for minutes.

    Args:
        address: 'auto', host:port, or ray://host:port.

    Returns:
        The address as Ray takes it, and as it is shown to the user: with its origin if it was looked up.

    Raises:
        PoolError: No live cluster at the address; the message names the address, its origin and the remedy.
    """
    resolved, described = address, repr(address)
    if address == "auto":
        try:
            resolved = get_ray_address_from_environment("auto", None)
        except ConnectionError:
            raise _no_cluster("'auto'", "no Ray runs on this machine, and RAY_ADDRESS is not set") from None
        by_ray = "found by Ray on this machine; its file ray_current_cluster may be out of date"
        described = f"{resolved!r} ({'from RAY_ADDRESS' if os.environ.get('RAY_ADDRESS') else by_ray})"
    host, _, port = resolved.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise _no_cluster(described, "it is not host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(described, str(error)) from error
    if not resolved.startswith("ray://") and os.environ.get("RAY_USE_TLS") != "1":
        _check_is_head(resolved, described)
    return resolved, described


def _check_is_head(address: str, described: str) -> None:
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            # A head that wants a token is a head; Ray sends the token when it connects.
            if code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                reason = f"what listens there is not the head of a cluster ({code.name.lower().replace('_', ' ')})"
                raise _no_cluster(described, reason) from error


def _no_cluster(described: str, reason: str) -> PoolError:
    return PoolError(
        f"no Ray cluster at {described}: {reason}; start one with `ray up ray_cluster.yaml` or `ray start --head`, "
        f"give the address of its head (port 6379 by default), or leave out --address for a local Ray"
    )


@contextmanager
def _signals_end_the_process() -> Iterator[None]:
    """End the process on SIGINT and SIGTERM even while Ray's C++ code keeps Python from handling them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    previous = signal.set_wakeup_fd(sending)  # written by the C handler, at once
    done = threading.Event()

    def watch() -> None:
        received = os.read(receiving, 1)  # empty once the other end is closed
        if received and received[0] in (signal.SIGINT, signal.SIGTERM) and not done.wait(HANDLING_SECONDS):
            os.write(2, b"interrupted while connecting to Ray\n")
            os._exit(128 + received[0])
        os.close(receiving)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous)
        os.close(sending)


def check_fits(
    hosts: int,
    host_cpus: float,
    host_gpus: float,
    other_cpus: float,
    other_gpus: float = 0.0,
    others: str = "one trial",
    keys: str = "resources.trial_cpus",
) -> None:
    """Refuse resource settings with which the work would deadlock.

    Args:
        hosts: Number of hosts.
        host_cpus, host_gpus: Resources of each host.
        other_cpus, other_gpus: Resources that must be free beside all hosts.
        others: What needs these resources, for the error message.
        keys: Configuration keys that reduce them, for the error message.

    Raises:
        PoolError: The cluster is too small. The message names the resources requested, those available, and the remedy.
    """
    available = ray.cluster_resources()
    for unit, of_host, of_others in (("CPU", host_cpus, other_cpus), ("GPU", host_gpus, other_gpus)):
        need, have = hosts * of_host + of_others, available.get(unit, 0.0)
        if need <= have + 1e-9:
            continue
        others_text = f" and {others} of {of_others:g} {unit}" if of_others else ""
        remedy = f"resources.hosts or resources.host_cpus or {keys}"
        if unit == "GPU":
            remedy = "resources.hosts or resources.host_gpus, or set resources.device to cpu"
        raise PoolError(
            f"{counted(hosts, 'host')} of {of_host:g} {unit}{others_text} need {need:g} {unit}s, but the cluster "
            f"has {have:g}; lower {remedy}"
        )
