"""A session: an experiment with everything it runs on. What every command that needs hosts starts with."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import TracebackType

from orchestrator.cluster.preflight import check_nodes
from orchestrator.config.experiment import ExperimentConfig, cpu_budget, resolve_tracking_uri
from orchestrator.errors import PoolError
from orchestrator.hosts.settings import HostSettings, ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.router import PoolSettings, RayPool, check_fits, connect
from orchestrator.progress import Note, note
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import Tracker, open_experiment
from sweeps.space import SPLITS, PairKey, Split, pair_specs


class Session:
    """An experiment with everything it runs on: storage, hosts, MLflow. A context manager: its hosts end with it."""

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        address: str | None,
        wait: bool,
        announce: Note = note,
        tracked: bool = True,
    ):
        """
        Args:
            config: A checked configuration.
            address: Ray cluster; None for a local one.
            wait: Whether to wait for another process on the same pairs.
            announce: Told what happens, in sentences.
            tracked: Whether MLflow will be used: it is then resolved, and every node must reach it.

        Raises:
            UserError: Something in the configuration or the environment cannot work.
        """
        self.config, self.wait = config, wait
        self.storage = Storage.at(config.storage)
        asked = self.tracking_uri if tracked else None
        self.storage.check_writable()
        resources = config.resources
        connect(address, cpu_budget(resources))
        known = check_nodes(self.storage, asked)
        try:
            check_fits(resources.hosts, resources.host_cpus, resources.host_gpus, resources.trial_cpus)
        except PoolError as error:
            if address is None:
                raise
            # A cluster may still grow: its autoscaler starts nodes for what is asked.
            announce(f"{error}. Waiting for the cluster to grow to it")
        host = HostSettings(
            adapter=config.model.name,
            options=dict(config.model.options),
            storage=self.storage.root,
            device=resources.device,
            threads=resources.host_threads,
            memory_bytes=int(resources.host_memory_gb * 1e9),
            precision=resources.precision,
            checkpoint=resources.checkpoint,
            compile=resources.compile,
        )
        pool = PoolSettings(
            hosts=resources.hosts,
            cpus=resources.host_cpus,
            gpus=resources.host_gpus,
            request_timeout=resources.request_timeout,
            merge=resources.merge,
        )
        # A name of its own: a pool that is found by a shared one may be that of a session which is ending.
        self.pool_name = f"pool-{config.name}-{uuid.uuid4().hex[:8]}"
        self.pool = RayPool.start(self.pool_name, host, pool)
        if tracked:  # while hosts load their models: a new store takes seconds to make
            self._tracking = ThreadPoolExecutor(1).submit(
                open_experiment, self.tracking_uri, self.config.name, self.storage
            )
        try:
            self.facts: ModelFacts = self.pool.call("facts")
            # A cluster that scales has started its nodes only now, for the hosts.
            check_nodes(self.storage, asked, known)
            self.specs: dict[PairKey, PairSpec] = pair_specs(config, self.facts)
        except BaseException:
            self.pool.close()
            raise

    @cached_property
    def tracking_uri(self) -> str:
        """Where MLflow is.

        Raises:
            ConfigError: None was given, and there can be none beside the storage.
        """
        return resolve_tracking_uri(self.config.tracking_uri, self.config.storage)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.close()

    def make_pairs(self, announce: Note = note, splits: Collection[Split] = SPLITS) -> None:
        """Make what is missing of the experiment's pair stores, of these splits."""
        specs = [spec for key, spec in self.specs.items() if key.split in splits]
        ensure_pairs(self.storage, specs, self.pool, wait=self.wait, note=announce)

    def open_tracking(self) -> tuple[Tracker, str]:
        """MLflow and the id of the experiment in it, both made where they were not there yet.

        That happens on the driver, before any trial: several processes that open a new SQLite store together fail.

        Raises:
            UserError: The store cannot be used.
        """
        return self._tracking.result()
