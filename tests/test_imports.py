"""Dependencies point one way, no import is circular, and heavy libraries have one door each."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("solvers", "orchestrator", "sweeps")


def import_graph(root: Path) -> dict[str, set[str]]:
    """Modules by name, and the modules of the project that each imports: also inside functions, also for types."""
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


def test_no_file_imports_itself_through_others(repository: Path) -> None:
    """Imports inside functions and for type checking count: they hide circles, they do not resolve them."""
    graph = import_graph(repository)
    assert len(graph) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circular import: " + " -> ".join(reversed(error.args[1])))


def test_loose_modules_stay_few(repository: Path) -> None:
    """A module of the orchestrator belongs to a package, unless many import it for one concept."""
    loose = {path.stem for path in (repository / "orchestrator").glob("*.py")} - {"__init__"}
    assert loose == {"errors", "lock", "plugins", "progress", "randomness", "storage"}


def test_the_contracts_of_import_linter_are_kept(repository: Path) -> None:
    """Packages are layers; torchdiffeq, MLflow and Ray are imported where pyproject.toml says and nowhere else."""
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
        ("orchestrator.hosts.settings", ["ray", "mlflow", "torchdiffeq", "orchestrator.hosts.host"]),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str, absent: list[str]) -> None:
    """solvers works with torch alone, and `bespoke --help` answers at once."""
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
