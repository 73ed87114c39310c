"""Shared fixtures: a small experiment on the shipped digits model, its pairs, storages, pools and a local Ray."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.requests import Request

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest
import torch

if TYPE_CHECKING:
    from s3_server import S3Server

    from orchestrator.config.experiment import ExperimentConfig
    from orchestrator.config.pair_plan import PairKey
    from orchestrator.hosts.settings import HostSettings
    from orchestrator.models.facts import ModelFacts
    from orchestrator.pairs import PairSpec
    from orchestrator.pool.client import RayPool
    from orchestrator.pool.requests import LocalPool, Request
    from orchestrator.storage import Storage

# Heavy imports stay inside the fixtures: the solver tests need only torch.

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def experiment() -> dict[str, Any]:
    """A small experiment, as parsed from a YAML file. Each test gets its own copy."""
    return _small_experiment()


def _small_experiment() -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
        "pairs": {
            "train": 48,
            "validation": 32,
            "test": 40,
            "rtol": 1e-4,
            "atol": 1e-4,
            "batch_size": 8,
            "shard_size": 16,
        },
        "nfe": [4],
        "fixed": ["euler", "midpoint"],
        "grid_search": {"p": [1.0, 1.4], "q": [1.0, 1.2], "also": [], "pairs": 16},
        "learned": [
            {
                "family": "bns",
                "start": ["best"],
                "learning_rate": [5e-3],
                "iterations": 20,
                "batch_size": 16,
                "validate_every": 10,
            }
        ],
        "resources": {"hosts": 2, "host_cpus": 0.25, "trial_cpus": 0.25, "local_cpus": 2},
    }


@pytest.fixture(scope="session")
def config() -> ExperimentConfig:
    """The small experiment as a validated configuration."""
    from orchestrator.config.reading import parse_config

    config = parse_config(_small_experiment(), "the small experiment")
    config.check()
    return config


@pytest.fixture(scope="session")
def host_settings() -> Callable[..., HostSettings]:
    """Makes the host settings of a zoo model for a given storage."""
    from orchestrator.hosts.settings import HostSettings

    def settings(storage: Storage, weights: str = "digits_fm_ot") -> HostSettings:
        return HostSettings(adapter="zoo", options={"weights": weights}, storage=storage.root)

    return settings


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Storage with the small experiment's pairs, filled by ``specs``. Shared by the session: do not write to it."""
    from orchestrator.storage import Storage

    return Storage.at(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def pool(made: Storage, host_settings: Callable[..., HostSettings]) -> LocalPool:
    """A pool of one host in this process."""
    from orchestrator.hosts.host import Host
    from orchestrator.pool.requests import LocalPool

    return LocalPool(Host(host_settings(made)))


@pytest.fixture(scope="session")
def facts(pool: LocalPool) -> ModelFacts:
    """Facts of the digits model."""
    return pool.call(Request.of(HostProtocol.facts))


@pytest.fixture(scope="session")
def specs(config: ExperimentConfig, facts: ModelFacts, made: Storage, pool: LocalPool) -> dict[PairKey, PairSpec]:
    """Specs of the small experiment's pair sets, all of them complete in ``made``."""
    from orchestrator.config.pair_plan import pair_specs
    from orchestrator.pairs.make import ensure_pairs

    specs = pair_specs(config, facts)
    ensure_pairs(made, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    return specs


@pytest.fixture
def scoring(facts: ModelFacts, specs: dict[PairKey, PairSpec]) -> list[Request]:
    """Twelve requests that score Midpoint at NFE 4, each on a different set of three pairs."""
    from orchestrator.config.pair_plan import PairKey
    from orchestrator.hosts.distillation import to_numpy
    from solvers.families import GridSolver
    from solvers.families.midpoint import Midpoint
    from solvers.grids import Grid

    theta = to_numpy(GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler).flat())
    pairs = specs[PairKey("test", 1.0, 0)].name
    return [
        Request.of(HostProtocol.score, theta=theta, pairs=pairs, metrics=["psnr"], indices=[i, i + 1, i + 2])
        for i in range(12)
    ]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty storage for this test."""
    from orchestrator.storage import Storage

    return Storage.at(tmp_path / "storage")


@pytest.fixture
def copied(made: Storage, specs: dict[PairKey, PairSpec], tmp_path: Path) -> Storage:
    """A copy of the small experiment's pairs, which the test may damage."""
    from orchestrator.storage import Storage

    return Storage.at(shutil.copytree(made.root, tmp_path / "copied"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two cores and two GPUs that do not exist; it schedules as a cluster would."""
    import ray

    from orchestrator.pool.client import NAMESPACE

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_pool(ray_session: None) -> Iterator[Callable[..., RayPool]]:
    """Starts pools of host actors, each on half a fake GPU. Pools end with the module or by ``ray.kill``."""
    import ray

    from orchestrator.hosts.host import Host
    from orchestrator.pool.client import RayPool
    from orchestrator.pool.requests import PoolSettings

    started: list[RayPool] = []

    def start(settings: HostSettings, hosts: int, request_timeout: float | None = None) -> RayPool:
        name = f"test-{os.getpid()}-{len(started)}-{settings.storage}"
        pool = RayPool.start(
            name, Host, settings, PoolSettings(hosts=hosts, cpus=0.5, gpus=0.5, request_timeout=request_timeout)
        )
        started.append(pool)
        return pool

    yield start
    for pool in started:
        ray.kill(pool.router)


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage that is not a directory: objects in memory, without folders, renames or file locks."""
    import fsspec
    import pyarrow.fs as pafs

    from orchestrator.storage import Storage

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.store = {}
    memory.pseudo_dirs = [""]
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    monkeypatch.setattr(Storage, "_located", property(lambda self: (filesystem, "bucket/root")))
    return Storage("s3://bucket/root")


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    from s3_server import S3Server

    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_server(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server on this machine, with its credentials in the environment. No faults unless the test sets one."""
    from s3_server import CREDENTIALS

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    _s3_server.fault = None
    yield _s3_server
    _s3_server.fault = None


@pytest.fixture
def s3_storage(s3_server: S3Server) -> Storage:
    """An empty storage in a bucket of its own."""
    from orchestrator.storage import Storage

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(bucket)
    return Storage.at(s3_server.root(bucket))


@pytest.fixture
def copied_to_s3(made: Storage, specs: dict[PairKey, PairSpec], s3_storage: Storage) -> Storage:
    """The small experiment's pairs on S3, which the test may damage."""
    for folder in made.names("pairs"):
        for name in made.names(f"pairs/{folder}"):
            s3_storage.write(f"pairs/{folder}/{name}", made.read(f"pairs/{folder}/{name}"))
    return s3_storage
