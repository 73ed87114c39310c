"""The commands as a user types them, for a small network of every kind, on one Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from kinds.examples import EXAMPLES, Example

from orchestrator.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def command(*arguments: str) -> str:
    """Run a command of `bespoke` that must succeed, and return its output."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


ON_RAY = ("digit_flow_onnx", "latent_digits", "rings", "reach", "imputer")
"""One example of each kind of adapter, sample and conditioning; all go all the way in one process by default."""


@pytest.mark.parametrize("example", [EXAMPLES[name] for name in ON_RAY], ids=lambda example: example.name)
def test_the_commands_go_all_the_way(
    example: Example,
    files: Callable[[Example], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
) -> None:
    """`check` refuses nothing, `sweep` leaves a report with pictures and thetas, and `export` one file."""
    monkeypatch.chdir(files(example))
    storage = tmp_path / "data"
    command("check", str(example.config), "--storage", str(storage))
    output = command("sweep", str(example.config), "--storage", str(storage), "grid_search=null")
    folder = storage / "experiments" / example.name
    assert f"report: {folder}/report.html" in output
    assert "cannot be drawn" not in output
    assert {path.name for path in folder.iterdir()} >= {"comparison.csv", "report.html", "thetas"}
    (theta,) = (folder / "thetas").iterdir()
    command("export", str(theta), "--to", "python", str(tmp_path / "sampler.py"))
    assert "def sample_network" in (tmp_path / "sampler.py").read_text(encoding="utf-8")
