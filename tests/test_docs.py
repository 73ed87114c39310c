"""The code and the names in the documentation work as written."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import solvers.families
from orchestrator import plugins
from orchestrator.cli.main import main
from orchestrator.config.reading import load_config
from orchestrator.errors import ConfigError
from orchestrator.models.zoo import ZooModel
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.field import FunctionField
from solvers.grids import Grid
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact

ROOT = Path(__file__).parents[1]


def code_block(document: str, language: str, position: int = 0) -> str:
    """Return the n-th fenced block of a language in a document."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)
    return str(blocks[position])


def test_the_readme_samples_with_a_theta_in_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet of 'Using θ', with a solver saved in place of the demo's."""
    model = ZooModel("digits_fm_ot")
    solver = GridSolver(Midpoint(), 8, Grid()).to_ns(model.scheduler)
    thetas = tmp_path / "bespoke-data/experiments/digits/thetas"
    ThetaArtifact(solver, model_digest=model.digest).save(thetas / "bns-lm-nfe8.json")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_block("README.md", "python"), names)
    assert names["digits"].shape == (10, 1, 8, 8)
    assert 0.5 < float(names["digits"].std()) < 1  # ink and paper, in [-1, 1]


def test_the_solver_of_the_how_to_is_a_family() -> None:
    """docs/extending.md: the file as shown defines a family of its stated order, equal to its non-stationary form."""
    names: dict[str, Any] = {"__name__": "ralston"}
    exec(compile(code_block("docs/extending.md", "python"), "ralston.py", "exec", dont_inherit=True), names)
    family = names["FAMILY"]()
    field = FunctionField(lambda x, t: torch.tanh(x) * (1 + t), CondOT())
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    solver = GridSolver(family, 8, Grid())
    sampled = solver.sample(field, x0)
    torch.testing.assert_close(solver.to_ns(CondOT()).sample(field, x0), sampled, rtol=1e-12, atol=0)
    exact = GridSolver(family, 4096, Grid()).sample(field, x0)
    coarse, fine = ((GridSolver(family, n, Grid()).sample(field, x0) - exact).abs().max() for n in (64, 128))
    assert float(torch.log2(coarse / fine)) == pytest.approx(family.order, abs=0.2)


def test_the_file_of_the_how_to_is_all_a_new_family_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once saved, it is listed and may be used in a configuration; an NFE that is not a multiple of 2 is refused."""
    (tmp_path / "ralston.py").write_text(code_block("docs/extending.md", "python"), encoding="utf-8")
    monkeypatch.setattr(solvers.families, "__path__", [*solvers.families.__path__, str(tmp_path)])
    assert "ralston" in plugins.names("families")
    listed = CliRunner().invoke(main, ["list", "families"]).output
    assert re.search(r"^ralston +2 +2  Ralston's second-order method", listed, re.MULTILINE)
    config = str(ROOT / "sweeps/configs/digits.yaml")
    assert [f.label for f in load_config(config, ["fixed=[ralston]"]).fixed] == ["Ralston"]
    with pytest.raises(ConfigError, match=r"fixed family 'ralston' at nfe 5: Ralston makes 2 evaluations per step"):
        load_config(config, ["fixed=[ralston]", "nfe=[5]"])


@pytest.mark.parametrize("document", ["README.md", "docs/cluster.md", "docs/solvers.md", "CONTRIBUTING.md"])
def test_links_and_configurations_in_a_document_exist(document: str) -> None:
    """Relative links and paths of shipped configurations."""
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"\bsweeps/configs/[\w/]+\.yaml", text)
    assert links or named
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_command_in_the_readme_exists() -> None:
    """The README shows each command of `bespoke`, and no other."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = {line.split()[1] for line in re.findall(r"^bespoke \w+.*$", text, re.M)}
    assert commands == set(main.commands)
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(f"{command} --help"))
        assert result.exit_code == 0


def test_the_recogniser_of_the_how_to_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/extending.md: the file as shown transcribes as described, under its own name."""
    monkeypatch.setitem(sys.modules, "parrot", types.ModuleType("parrot"))  # where dataclasses looks up types
    names: dict[str, Any] = {"__name__": "parrot"}
    exec(compile(code_block("docs/extending.md", "python", 2), "parrot.py", "exec", dont_inherit=True), names)
    recogniser = names["RECOGNISER"](word="Two!")
    assert recogniser.name == "parrot"
    heard = recogniser.transcribe([np.zeros(8, np.float32)] * 2, 8000)
    assert [recogniser.words(text) for text in heard] == [["two"], ["two"]]


# ---- the architecture page -------------------------------------------------------------------------------------------


def test_the_architecture_page_lists_the_layers_of_the_import_contract() -> None:
    """docs/architecture.md, from the top line down, matches pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [contract for contract in contracts if "containers" in contract]
    enforced = [set(layer.split(" | ")) for layer in contract["layers"]]
    table = re.findall(r"^\| \d+ \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
    documented = [{name.removeprefix("orchestrator/") for name in re.findall(r"`(.*?)`", cell)} for cell in table]
    assert [layer for layer in documented if layer not in ({"sweeps"}, {"solvers"})] == enforced


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md"])
def test_python_files_named_by_a_page_exist(page: str) -> None:
    """Every Python file in backticks, by its path from the root or from a package."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {
        name for name in re.findall(r"`([\w/]+\.py)`", text) if not re.search("NAME|ralston|gradient_descent", name)
    }
    folders = ["", "orchestrator", "sweeps", "sweeps/points", "solvers", "solvers/distil", "solvers/distil/methods"]
    missing = [name for name in names if not any((ROOT / folder / name).is_file() for folder in folders)]
    assert missing == []


def test_files_and_functions_stay_as_short_as_contributing_says() -> None:
    """450 lines per file and 60 per function, apart from at most three exceptions that are listed there."""
    (rule,) = re.findall(r"\*\*Sizes\.\*\*.*?\n- ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    exceptions = {name.rpartition(".")[0] or name for name in re.findall(r"`(.*?)`", rule)}
    assert len(exceptions) <= 3
    long = []
    for package in ("solvers", "orchestrator", "sweeps"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") > 450:
                long.append(str(path.relative_to(ROOT)))
            tree = ast.parse(text)
            for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
                for function in owner.body:
                    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                        length = (function.end_lineno or 0) - function.lineno + 1
                        if length > 60 and not exceptions & {function.name, getattr(owner, "name", "")}:
                            long.append(f"{path.relative_to(ROOT)}: {function.name} has {length} lines")
    assert long == []
