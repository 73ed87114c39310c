"""A session starts nothing on a cluster that cannot do the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import BusyStoreError, ConfigError
from orchestrator.models.facts import ModelFacts
from orchestrator.pool.client import RayPool
from orchestrator.pool.requests import LocalPool
from orchestrator.storage import Storage
from sweeps import ray_session, session
from sweeps.opening import open_session
from sweeps.ray_session import RaySession

PreflightCalls = list[tuple[str, str | None, set[str]]]


@pytest.fixture
def preflight_calls(monkeypatch: pytest.MonkeyPatch, pool: LocalPool) -> PreflightCalls:
    """Arguments of the preflight checks; the cluster has one node, and Ray and the hosts are fakes."""
    calls: PreflightCalls = []

    def check_nodes(storage: Storage, tracking_uri: str | None, known: Collection[str] = ()) -> set[str]:
        calls.append((storage.root, tracking_uri, set(known)))
        return {"head"}

    monkeypatch.setattr(session, "check_outside", lambda storage, tracking_uri, address: None)
    monkeypatch.setattr(ray_session, "connect", lambda address, cpus: None)
    monkeypatch.setattr(ray_session, "check_fits", lambda *resources: None)
    monkeypatch.setattr(ray_session, "check_nodes", check_nodes)
    monkeypatch.setattr(RayPool, "start", lambda name, actor_class, host, settings: _Closing(pool))
    return calls


class _Closing:
    def __init__(self, pool: LocalPool):
        self.call = pool.call

    def close(self) -> None:
        pass


def _config(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return config.model_copy(update=changes)


def test_nodes_are_checked_before_the_hosts_start_and_again_once_they_run(
    config: ExperimentConfig, preflight_calls: PreflightCalls, tmp_path: Path, facts: ModelFacts
) -> None:
    """An autoscaling cluster adds its nodes only when hosts need them."""
    opened = RaySession(_config(config, storage=str(tmp_path)), address="auto", wait=False, command="sweep")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert preflight_calls == [(str(tmp_path), uri, set()), (str(tmp_path), uri, {"head"})]
    assert dataclasses.asdict(opened.facts) == dataclasses.asdict(facts)


def test_a_failed_check_is_raised_before_any_host_starts(
    config: ExperimentConfig, preflight_calls: PreflightCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to shut down."""

    def refuse(*arguments: object) -> set[str]:
        raise ConfigError("on node 10.0.0.2: the storage cannot be used")

    monkeypatch.setattr(ray_session, "check_nodes", refuse)
    monkeypatch.setattr(RayPool, "start", lambda *arguments: pytest.fail("hosts were started"))
    with pytest.raises(ConfigError, match=r"on node 10\.0\.0\.2"):
        RaySession(_config(config, storage=str(tmp_path)), address="auto", wait=False, command="sweep")


def test_pairs_alone_need_no_mlflow(
    config: ExperimentConfig, preflight_calls: PreflightCalls, object_store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store, where SQLite is impossible, pairs are made all the same; a sweep needs --tracking-uri."""
    with pytest.raises(ConfigError, match=r"storage 's3://bucket/root' is remote, .*give --tracking-uri"):
        RaySession(_config(config, storage=object_store.root), address="auto", wait=False, command="sweep")
    RaySession(_config(config, storage=object_store.root), address="auto", wait=False, tracked=False, command="pairs")
    assert [uri for _, uri, _ in preflight_calls] == [None, None]


def test_a_session_without_an_address_runs_the_host_in_this_process(config: ExperimentConfig, tmp_path: Path) -> None:
    """On the threads that torch has; the command's lock and MLflow are as on Ray."""
    before = torch.get_num_threads()
    config = _config(config, storage=str(tmp_path))
    with open_session(config, address=None, wait=False, command="distil", locked=True) as opened:
        assert isinstance(opened.pool, LocalPool)
        assert (opened.hosts, torch.get_num_threads()) == (1, before)
        _, experiment = opened.open_tracking()
        assert experiment.isdigit()
        with pytest.raises(BusyStoreError, match="is in use by"):
            open_session(config, address=None, wait=False, command="distil", locked=True)
