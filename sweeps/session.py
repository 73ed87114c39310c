"""Session: an experiment with its storage, hosts and MLflow store, for every command that needs hosts.

Here, the hosts are one in this process; :mod:`sweeps.ray_session` has those of Ray. Neither Ray nor MLflow is imported
before it is needed, since that takes seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from orchestrator.cluster.answers import check_outside
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.settings import HostSettings
from orchestrator.lock import exclusive
from orchestrator.log import logged_to
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import complete, ensure_pairs
from orchestrator.pool.requests import LocalPool, Pool, Request
from orchestrator.progress import Note, counted, note, stage
from orchestrator.results.inventory import note_older, record_needs
from orchestrator.storage import Storage
from orchestrator.tracking.uri import resolve_tracking_uri, sqlite_path
from sweeps.examination import Subject, check_teacher
from sweeps.point import RESULT_FORMAT

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import RunLog, Tracker


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


class Session(ABC):
    """An experiment with its storage, hosts and MLflow store.

    A context manager. When it ends, its hosts stop and its lock is released.

    Attributes:
        pool: The hosts.
        facts: Facts of their model.
        log: The command's log.
        address: Ray cluster of the hosts: 'auto' or host:port; None without one, or for a local one.
        reused: Names of the pairs that were complete before this command.
        examined: What the examination looked at in this command.
    """

    pool: Pool
    facts: ModelFacts
    address: str | None = None

    def __init__(
        self,
        config: ExperimentConfig,
        *,
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
        self.reused: set[str] = set()
        self.folder = f"experiments/{config.name}"
        self.storage = Storage.at(config.storage)
        self.tracked, self.command, self.force = tracked, command, force
        self.examined: list[Subject] = []
        check_outside(self.storage, self.tracking_uri if tracked else None, self.address)
        note_older(self.storage, RESULT_FORMAT, announce)
        with ExitStack() as stack:
            if locked:
                stack.enter_context(exclusive(self.storage, f"{self.folder}/.lock", wait=wait, announce=announce))
            self._connect()
            self.log = stack.enter_context(logged_to(self.storage, f"{self.folder}/{command}.log"))
            self._start(stack)
            if self.facts.interpolation:
                self.announce(f"{self.facts.name}: {self.facts.interpolation}")
            self._stack = stack.pop_all()

    @property
    @abstractmethod
    def hosts(self) -> int:
        """Number of hosts."""

    @abstractmethod
    def _connect(self) -> None:
        """Reach what the hosts will run on, before the log is opened."""

    @abstractmethod
    def _start(self, stack: ExitStack) -> None:
        """Start the hosts and, while they load their model, MLflow; sets ``pool`` and ``facts``."""

    def _open_tracking(self, stack: ExitStack) -> None:
        """Begin to open the MLflow store, beside the hosts' start, since it takes seconds."""
        if self.tracked:
            executor = ThreadPoolExecutor(1)
            # MLflow cannot create two SQLite stores at once, and the next session of this process may.
            stack.callback(executor.shutdown, wait=sqlite_path(self.tracking_uri) is not None)
            self._tracking: Future[tuple[Tracker, str]] = executor.submit(self._opened)

    def _opened(self) -> tuple[Tracker, str]:
        from orchestrator.tracking.mlflow import open_experiment

        return open_experiment(self.tracking_uri, self.config.name, self.storage)

    @cached_property
    def specs(self) -> dict[PairKey, PairSpec]:
        """Specs of the pair sets of the configuration."""
        return pair_specs(self.config, self.facts)

    @cached_property
    def tracking_uri(self) -> str:
        """Address of the MLflow store.

        Raises:
            ConfigError: No address is configured, and the storage cannot hold a default store.
        """
        return resolve_tracking_uri(self.config.tracking_uri, self.config.storage)

    def __enter__(self) -> Self:
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


class LocalSession(Session):
    """A session whose only host is in this process, without Ray."""

    @property
    def hosts(self) -> int:
        return 1

    def _connect(self) -> None:
        """This process is there."""

    def _start(self, stack: ExitStack) -> None:
        self._open_tracking(stack)
        threads = torch.get_num_threads()  # the cores of this machine, OMP_NUM_THREADS, or what a notebook has set
        with stage(f"loading model {self.config.model.name} in this process, {counted(threads, 'thread')}"):
            settings = replace(host_settings(self.config, self.storage), threads=threads)
            self.pool = LocalPool(Host(settings))
        self.facts = self.pool.call(Request.of(HostProtocol.facts))


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
