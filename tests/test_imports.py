"""Dependencies point one way, and heavy libraries have one door each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("solvers", "orchestrator", "sweeps")


def test_the_contracts_of_import_linter_are_kept(repository: Path) -> None:
    """sweeps imports orchestrator imports solvers, never back; torchdiffeq, MLflow and Ray have one importer each."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("solvers", ["ray", "mlflow", "pyarrow", "torchdiffeq", "pydantic", "sklearn", "orchestrator", "sweeps"]),
        ("orchestrator.cli.main", ["torch", "ray", "mlflow", "matplotlib"]),
        ("orchestrator.config.experiment", ["ray", "mlflow", "torchdiffeq"]),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str, absent: list[str]) -> None:
    """solvers works with torch alone, and `bespoke --help` answers at once."""
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
