"""Connects to a Ray cluster or starts a local one, and checks that a workload fits it."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray

from orchestrator.errors import PoolError
from orchestrator.pool.client import NAMESPACE

CONNECT_SECONDS = 5.0


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
    logging.getLogger("ray").setLevel(logging.ERROR)  # before init, which logs its own notices
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # 'local' is explicit: by default Ray joins the cluster that was last started on this machine.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
        return
    try:
        _check_listens(address)
        ray.init(address=address, **common)
    except (OSError, RuntimeError, ValueError) as error:
        raise PoolError(
            f"no Ray cluster at {address!r}: {error}; start one with `ray up ray_cluster.yaml`, or leave out --address "
            f"for a local Ray"
        ) from error


def _check_listens(address: str) -> None:
    """Fail within seconds if nothing listens at the address; Ray itself would try for minutes.

    Raises:
        OSError: Nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass


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
            f"{hosts} hosts of {of_host:g} {unit}{others_text} need {need:g} {unit}s, but the cluster has {have:g}; "
            f"lower {remedy}"
        )
