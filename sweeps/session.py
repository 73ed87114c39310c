"""Session: an experiment with its storage, hosts and MLflow store, for every command that needs hosts."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType

from orchestrator.cluster.connect import check_fits, check_outside, connect
from orchestrator.cluster.preflight import check_nodes
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.errors import PoolError
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.lock import exclusive
from orchestrator.log import logged_to
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import complete, ensure_pairs
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import PoolSettings, Request
from orchestrator.progress import Note, counted, note, stage
from orchestrator.results.inventory import note_older, record_needs
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import RunLog, Tracker, open_experiment
from orchestrator.tracking.uri import resolve_tracking_uri
from sweeps.examination import Subject, check_teacher
from sweeps.point import RESULT_FORMAT


def host_settings(config: ExperimentConfig, storage: Storage) -> HostSettings:
    """Settings of the experiment's hosts."""
    resources = config.resources
    return HostSettings(
        adapter=config.model.name,
        options=dict(config.model.options),
        storage=storage.root,
        device=resources.device,
        threads=resources.host_threads,
        memory_bytes=int(resources.host_memory_gb * 1e9),
        precision=resources.precision,
        checkpoint=resources.checkpoint,
        compile=resources.compile,
    )


class Session:
    """An experiment with its storage, hosts and MLflow store.

    A context manager. When it ends, its hosts stop and its lock is released.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        address: str | None,
        wait: bool,
        announce: Note = note,
        tracked: bool = True,
        command: str,
        locked: bool = False,
        force: bool = False,
    ):
        """
        Args:
            config: A checked configuration.
            address: Ray cluster; None for a local one.
            wait: Whether to wait for another process that uses the same pairs or folder.
            announce: Receives progress notes, in sentences.
            tracked: Whether MLflow will be used. Its address is then resolved, and every node must reach it.
            command: Name of the command, and of its log in the experiment's folder.
            locked: Whether to lock the experiment's folder against other processes.
            force: Whether to go on with a teacher that its examination refuses.

        Raises:
            UserError: Something in the configuration or the environment cannot work.
        """
        self.config, self.wait, self.announce = config, wait, announce
        self.reused: set[str] = set()  # names of the pairs that were complete before this command
        self.folder = f"experiments/{config.name}"
        self.storage = Storage.at(config.storage)
        tracking_uri = self.tracking_uri if tracked else None
        self.command, self.force = command, force
        self.examined: list[Subject] = []
        check_outside(self.storage, tracking_uri, address)
        note_older(self.storage, RESULT_FORMAT, announce)
        with ExitStack() as stack:
            if locked:
                stack.enter_context(exclusive(self.storage, f"{self.folder}/.lock", wait=wait, announce=announce))
            with stage("starting Ray" if address is None else f"connecting to Ray at {address}"):
                connect(address, config.resources.cpu_budget)
            self.log = stack.enter_context(logged_to(self.storage, f"{self.folder}/{command}.log"))
            hosts = config.resources.hosts
            with stage(f"starting {counted(hosts, 'host')} with model {config.model.name}"):
                self._start(stack, address, tracking_uri)
            self._stack = stack.pop_all()

    def _start(self, stack: ExitStack, address: str | None, tracking_uri: str | None) -> None:
        config, resources = self.config, self.config.resources
        known = check_nodes(self.storage, tracking_uri)
        try:
            check_fits(resources.hosts, resources.host_cpus, resources.host_gpus, resources.trial_cpus)
        except PoolError as error:
            if address is None:
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
        if tracking_uri is not None:  # runs while hosts load their models, since it takes seconds
            executor = ThreadPoolExecutor(1)
            stack.callback(executor.shutdown, wait=False)
            self._tracking = executor.submit(open_experiment, tracking_uri, config.name, self.storage)
        self.facts: ModelFacts = self.pool.call(Request.of(HostProtocol.facts))
        if self.facts.interpolation:
            self.announce(f"{self.facts.name}: {self.facts.interpolation}")
        # Check the nodes that the autoscaler has started for the hosts since.
        check_nodes(self.storage, tracking_uri, known)
        self.specs: dict[PairKey, PairSpec] = pair_specs(config, self.facts)

    @cached_property
    def tracking_uri(self) -> str:
        """Address of the MLflow store.

        Raises:
            ConfigError: No address is configured, and the storage cannot hold a default store.
        """
        return resolve_tracking_uri(self.config.tracking_uri, self.config.storage)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def make_pairs(self, specs: Collection[PairSpec]) -> None:
        """Make the missing ground-truth pairs of these sets, if the examination of their teacher allows it.

        Raises:
            TeacherError: It does not, and ``force`` is false.
        """
        self.examined += check_teacher(
            self.storage, self.pool, self.facts, specs, force=self.force, announce=self.announce
        )
        self.record_needs([f"pairs/{spec.digest}" for spec in specs])
        self.reused |= complete(self.storage, specs)
        ensure_pairs(self.storage, list(specs), self.pool, wait=self.wait, announce=self.announce)

    def record_needs(self, folders: Iterable[str], *, add: bool = True) -> None:
        """Record what this command needs in the storage, before it is used, so that ``bespoke store prune`` keeps it.

        Args:
            folders: Keys of folders.
            add: Whether what was recorded earlier is still needed.
        """
        name, announce = self.config.name, self.announce
        record_needs(self.storage, name, self.command, folders, add=add, announce=announce)

    def open_tracking(self) -> tuple[Tracker, str]:
        """The MLflow tracker and the id of the experiment, both created if they did not exist.

        The driver creates them before any trial, because a new SQLite store cannot be opened by several processes at
        the same time.

        Raises:
            UserError: The store cannot be used.
        """
        return self._tracking.result()


def upload(storage: Storage, folder: str, files: Sequence[Path], log: RunLog) -> None:
    """Write these files to a folder of the storage and to a run."""
    for file in files:
        storage.write(f"{folder}/{file.name}", file.read_bytes())
        log.file(file)


def keep_only(storage: Storage, folder: str, names: Collection[str]) -> None:
    """Delete the files that an earlier run has left in a folder, except logs."""
    for name in set(storage.names(folder)) - set(names):
        if not name.endswith(".log"):
            storage.delete(f"{folder}/{name}")
