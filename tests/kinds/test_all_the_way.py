"""A small network of every kind, from its author's files to samples in its author's own program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kinds.examples import EXAMPLES, Example, run_in_process, sample_outside

from orchestrator.cli.main import main
from orchestrator.config.reading import load_config
from orchestrator.hosts.distillation import to_numpy
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.pool.requests import Request
from orchestrator.storage import Storage

SMALL = (
    "pairs.train=40",
    "pairs.validation=16",
    "pairs.test=16",
    "fixed=[euler]",
    "grid_search=null",
    "metrics=[psnr]",
)
"""A sweep of seconds in one process."""


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=lambda example: example.name)
def test_it_goes_all_the_way(
    example: Example,
    files: Callable[[Example], Path],
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs, a distilled solver that beats its start, the report, and the same samples from one exported file."""
    monkeypatch.chdir(files(example))
    outcome = run_in_process(load_config(example.config, SMALL), storage, tmp_path)
    assert outcome.best("learned") > outcome.best("start") + 3
    assert f"{outcome.best('learned'):.2f}" in outcome.report
    assert "could not be" not in outcome.report  # every figure was drawn

    outcome.theta.save(tmp_path / "theta.json")
    done = CliRunner().invoke(
        main, ["export", str(tmp_path / "theta.json"), "--to", "python", str(tmp_path / "sampler.py")]
    )
    assert done.exit_code == 0, done.output
    theta = to_numpy(outcome.theta.solver.flat())
    inside = outcome.pool.call(
        Request.of(HostProtocol.sample, theta=theta, pairs=outcome.tests.spec.name, indices=list(range(4)))
    )
    outside = sample_outside(example, files(example), tmp_path / "sampler.py", outcome.given(4))
    torch.testing.assert_close(outside, torch.from_numpy(inside), rtol=1e-5, atol=1e-5)
