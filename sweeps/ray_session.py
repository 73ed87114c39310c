"""The session of commands whose hosts are actors of Ray, on a cluster or on this machine."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import Any

from orchestrator.cluster.connect import check_fits, connect
from orchestrator.cluster.preflight import check_nodes
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import PoolError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import PoolSettings, Request
from orchestrator.progress import counted, stage
from sweeps.session import Session, host_settings


class RaySession(Session):
    """A session on Ray.

    Args:
        config: A checked configuration.
        address: Ray cluster; None for the one that this process is connected to, or else a local one.
        options: Further arguments of :class:`~sweeps.session.Session`.

    Raises:
        UserError: Something in the configuration or the environment cannot work.
    """

    pool: RayPool

    def __init__(self, config: ExperimentConfig, *, address: str | None, **options: Any):
        self.address = address
        super().__init__(config, **options)

    @property
    def hosts(self) -> int:
        return self.config.resources.hosts

    def _connect(self) -> None:
        with stage("starting Ray" if self.address is None else f"connecting to Ray at {self.address}"):
            connect(self.address, self.config.resources.cpu_budget)

    def _start(self, stack: ExitStack) -> None:
        with stage(f"starting {counted(self.hosts, 'host')} with model {self.config.model.name}"):
            self._start_hosts(stack)

    def _start_hosts(self, stack: ExitStack) -> None:
        config, resources = self.config, self.config.resources
        tracking_uri = self.tracking_uri if self.tracked else None
        known = check_nodes(self.storage, tracking_uri)
        try:
            check_fits(resources.hosts, resources.host_cpus, resources.host_gpus, resources.trial_cpus)
        except PoolError as error:
            if self.address is None:
                raise
            # The cluster may still grow, because the autoscaler starts nodes for the hosts requested below.
            self.announce(f"{error}. Waiting for the cluster to grow")
        host = host_settings(config, self.storage)
        pool = PoolSettings(
            hosts=resources.hosts,
            cpus=resources.host_cpus,
            gpus=resources.host_gpus,
            request_timeout=resources.request_timeout,
            max_batch=resources.batch_runs,
        )
        # The name is unique: a shared one could belong to the pool of a session that is just ending.
        self.pool_name = f"pool-{config.name}-{uuid.uuid4().hex[:8]}"
        self.pool = RayPool.start(self.pool_name, Host, host, pool)
        stack.callback(self.pool.close)
        self._open_tracking(stack)
        self.facts = self.pool.call(Request.of(HostProtocol.facts))
        # Check the nodes that the autoscaler has started for the hosts since.
        check_nodes(self.storage, tracking_uri, known)
