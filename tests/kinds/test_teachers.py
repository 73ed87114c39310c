"""The examination refuses no network of the examples, though each was trained for seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kinds.examples import EXAMPLES, Example

from orchestrator.config.pair_plan import pair_specs
from orchestrator.config.reading import load_config
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from sweeps.examination import examine, subjects
from sweeps.session import host_settings


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=lambda example: example.name)
def test_no_network_is_refused(
    example: Example, files: Callable[[Example], Path], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its shape, schedule, prediction, conditions and mask."""
    monkeypatch.chdir(files(example))
    config = load_config(example.config, ())
    pool = LocalPool(Host(host_settings(config, storage)))
    facts = pool.call(Request.of(HostProtocol.facts))
    for subject in subjects(pair_specs(config, facts).values()):
        findings = examine(storage, pool, facts, subject).findings
        assert [finding for finding in findings if finding.severity == "refused"] == []
