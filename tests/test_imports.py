"""Dependencies point one way, no import is circular, and each heavy library is imported in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("solvers", "orchestrator", "sweeps")


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return the project modules that each module imports, including imports in functions and for type checking."""
    paths = {path for package in PACKAGES for path in (root / package).rglob("*.py")}
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {full if full in modules else node.module for full in names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        graph[name] = imported & modules.keys()
    return graph


def test_no_import_is_circular(repository: Path) -> None:
    """Imports in functions and for type checking count: they hide a cycle without resolving it."""
    graph = import_graph(repository)
    assert len(graph) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circular import: " + " -> ".join(reversed(error.args[1])))


def test_top_level_modules_of_the_orchestrator_are_listed(repository: Path) -> None:
    """A module belongs in a package unless many packages import it for a single concept."""
    loose = {path.stem for path in (repository / "orchestrator").glob("*.py")} - {"__init__"}
    assert loose == {
        "content",
        "cost",
        "importing",
        "errors",
        "files",
        "lock",
        "log",
        "outside",
        "plugins",
        "progress",
        "randomness",
        "storage",
        "uris",
    }


def test_the_contracts_of_import_linter_are_kept(repository: Path) -> None:
    """Packages are layers; torchdiffeq, MLflow and Ray are imported only where pyproject.toml allows it."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("solvers", ["ray", "mlflow", "pyarrow", "torchdiffeq", "pydantic", "sklearn", "orchestrator", "sweeps"]),
        ("orchestrator.cli.main", ["torch", "ray", "mlflow", "matplotlib"]),
        ("orchestrator.config.reading", ["ray", "mlflow", "torchdiffeq"]),
        ("sweeps.opening", ["ray", "mlflow", "matplotlib"]),
        ("orchestrator.hosts.settings", ["ray", "mlflow", "torchdiffeq", "orchestrator.hosts.host"]),
    ],
)
def test_importing_a_module_does_not_load_unneeded_libraries(module: str, absent: list[str]) -> None:
    """solvers works with torch alone, and `bespoke --help` answers at once."""
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
