"""A session starts nothing on a cluster that cannot do the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import ConfigError
from orchestrator.hosts.host import ModelFacts
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from sweeps import session
from sweeps.session import Session

Asked = list[tuple[str, str | None, set[str]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, pool: LocalPool) -> Asked:
    """What the preflight is asked, on a cluster that grows by a node while the hosts start."""
    calls: Asked = []

    def check_nodes(storage: Storage, tracking_uri: str | None, known: Collection[str] = ()) -> set[str]:
        calls.append((storage.root, tracking_uri, set(known)))
        return {"head"}

    monkeypatch.setattr(session, "connect", lambda address, cpus: None)
    monkeypatch.setattr(session, "check_fits", lambda *resources: None)
    monkeypatch.setattr(session, "check_nodes", check_nodes)
    monkeypatch.setattr(RayPool, "start", lambda name, actor_class, host, settings: _Closing(pool))
    return calls


class _Closing:
    def __init__(self, pool: LocalPool):
        self.call = pool.call

    def close(self) -> None:
        pass


def _config(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return config.model_copy(update=changes)


def test_nodes_are_asked_before_the_hosts_start_and_again_when_they_are_up(
    config: ExperimentConfig, asked: Asked, tmp_path: Path, facts: ModelFacts
) -> None:
    """An autoscaling cluster has its nodes only when there are hosts for them."""
    opened = Session(_config(config, storage=str(tmp_path)), address="auto", wait=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert asked == [(str(tmp_path), uri, set()), (str(tmp_path), uri, {"head"})]
    assert dataclasses.asdict(opened.facts) == dataclasses.asdict(facts)


def test_a_refusal_comes_before_any_host(
    config: ExperimentConfig, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is started that would have to be ended."""

    def refuse(*arguments: object) -> set[str]:
        raise ConfigError("on node 10.0.0.2: the storage cannot be used")

    monkeypatch.setattr(session, "check_nodes", refuse)
    monkeypatch.setattr(RayPool, "start", lambda *arguments: pytest.fail("hosts were started"))
    with pytest.raises(ConfigError, match=r"on node 10\.0\.0\.2"):
        Session(_config(config, storage=str(tmp_path)), address="auto", wait=False)


def test_pairs_alone_need_no_mlflow(
    config: ExperimentConfig, asked: Asked, object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store, where there can be no SQLite: pairs are made all the same, a sweep asks for the address."""
    with pytest.raises(ConfigError, match=r"storage 's3://bucket/root' is remote, .*give --tracking-uri"):
        Session(_config(config, storage=object_store.root), address="auto", wait=False)
    Session(_config(config, storage=object_store.root), address="auto", wait=False, tracked=False)
    assert [uri for _, uri, _ in asked] == [None, None]
