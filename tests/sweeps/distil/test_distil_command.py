"""``bespoke distil`` in this process, on a tiny network: theta, report, tables, MLflow runs; again at no cost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import distil_place
import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli.main import main
from solvers.theta import load_theta

BUDGET = 20_000


def _run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["distil", *arguments, "--storage", str(folder / "data"), "--force"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder in which the command has run, with a YAML file of nothing but a model, and what it printed."""
    folder = tmp_path_factory.mktemp("distil")
    content: dict[str, Any] = {"model": {"name": "torch_module", "options": distil_place.NETWORK}}
    (folder / "tiny-flow.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    output = ("--output", str(folder / "mine"))
    result = _run(folder, str(folder / "tiny-flow.yaml"), "--nfe", "3,4", "--budget", str(BUDGET), *output)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return folder, result


@pytest.fixture
def results(finished: tuple[Path, Result]) -> Path:
    return finished[0] / "data/experiments/tiny-flow/distil"


def test_theta_is_a_file_that_loads(finished: tuple[Path, Result], results: Path) -> None:
    """One per NFE, named after experiment and NFE; the user's folder has the same."""
    for nfe in (3, 4):
        theta = load_theta(results / f"tiny-flow-nfe{nfe}.json")
        assert theta.solver.nfe == nfe
        assert theta.family == "bns"
    mine = sorted(path.name for path in (finished[0] / "mine").iterdir())
    assert mine == ["report.html", "table.json", "table.md", "tiny-flow-nfe3.json", "tiny-flow-nfe4.json"]
    for name in mine:
        assert (finished[0] / "mine" / name).read_bytes() == (results / name).read_bytes()


def test_the_plan_comes_first_and_what_was_made_last(finished: tuple[Path, Result]) -> None:
    """Evaluations, time and memory before the work; then the comparison, the cost, and how theta is used."""
    _, result = finished
    before, after = result.stderr, result.stdout
    assert re.search(r"tiny-flow: about [\d,]+ velocity evaluations \(at most 20,000\), .* MB beside the model", before)
    assert before.index("velocity evaluations (at most") < before.index("ground-truth pairs")
    assert "in this process, " in before
    for part in ("best fixed solver", "cost: ", "velocity evaluations", "report: ", "load_theta(", "bespoke export "):
        assert part in after, part


def test_the_budget_is_kept(results: Path) -> None:
    """By everything together, the report's samples included."""
    bill = json.loads((results / "table.json").read_text())["bill"]
    assert 0.5 * BUDGET < bill["bill/evaluations/total"] <= 1.05 * BUDGET


def test_the_report_is_one_small_file(results: Path) -> None:
    """With samples, numbers of theta, progress and bill, and nothing to be loaded from elsewhere."""
    page = (results / "report.html").read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert not re.search(r'(src|href)="(?!data:)', page)
    for nfe in (3, 4):
        assert f"Samples at NFE {nfe} from the same noise" in page
        assert f"The numbers of theta, NFE {nfe}" in page
    for part in ("Validation PSNR against evaluations spent", "What it cost", "Ground truth of the validation pairs"):
        assert part in page
    assert "could not be" not in page
    assert page.count("<img") == 2 * 2 + 2


def test_the_tables_have_both_solvers(results: Path) -> None:
    """theta is not below the solver that it started from."""
    entries = json.loads((results / "table.json").read_text())["thetas"]
    assert [entry["nfe"] for entry in entries] == [3, 4]
    for entry in entries:
        assert entry["psnr_db"] >= entry["start_psnr_db"]
        assert entry["best_fixed"]
        assert entry["evaluations"] <= 1.05 * BUDGET
    text = (results / "table.md").read_text(encoding="utf-8")
    assert "| NFE | theta (dB) | best fixed solver (dB) |" in text
    assert "| total |" in text


def test_other_commands_find_its_runs(finished: tuple[Path, Result], results: Path) -> None:
    """compare shows theta, its start and the fixed solver; register takes a run's theta."""
    storage = ("--storage", str(finished[0] / "data"))
    compared = CliRunner().invoke(main, ["compare", "tiny-flow", "--json", *storage])
    rows = json.loads(compared.stdout)
    assert {(row["kind"], row["nfe"]) for row in rows} == {
        (kind, nfe) for kind in ("learned", "best grid") for nfe in (3, 4)
    }
    assert {row["theta"] for row in rows if row["kind"] == "learned"} == {
        str(results / f"tiny-flow-nfe{nfe}.json") for nfe in (3, 4)
    }
    shown = CliRunner().invoke(main, ["compare", "tiny-flow", *storage])
    assert "on validation" in shown.output
    name = str(results / "tiny-flow-nfe4.json")
    registered = CliRunner().invoke(main, ["register", name, "--name", "tiny", *storage])
    assert registered.exit_code == 0, registered.output


def test_again_nothing_is_distilled_but_all_is_there(finished: tuple[Path, Result], tmp_path: Path) -> None:
    """The same thetas, byte for byte, from what is stored; a deleted report is made again."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    results = tmp_path / "data/experiments/tiny-flow/distil"
    thetas = {path.name: path.read_bytes() for path in results.glob("tiny-flow-*.json")}
    (results / "report.html").unlink()
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "data/pairs").rglob("*.parquet")}
    result = _run(tmp_path, str(tmp_path / "tiny-flow.yaml"), "--nfe", "3,4", "--budget", str(BUDGET))
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in results.glob("tiny-flow-*.json")} == thetas
    assert {path: path.stat().st_mtime_ns for path in states} == states
    assert (results / "report.html").exists()
    assert "in earlier commands" in result.stdout


def test_a_budget_that_is_too_small_names_the_least(finished: tuple[Path, Result], tmp_path: Path) -> None:
    """Before any pair is made."""
    result = _run(tmp_path, str(finished[0] / "tiny-flow.yaml"), "--nfe", "4", "--budget", "50")
    assert result.exit_code == 2
    assert re.search(r"error: a budget of 50 velocity evaluations is too small: .* take [\d,]+; give", result.stderr)
    assert not (tmp_path / "data/pairs").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_on_ray_it_leaves_the_same_files(ray_session: None, finished: tuple[Path, Result], tmp_path: Path) -> None:
    """With --address, on hosts of the cluster; theta differs from that of one process at most by rounding."""
    import ray

    address = ray.get_runtime_context().gcs_address
    config = str(finished[0] / "tiny-flow.yaml")
    arguments = (config, "--nfe", "4", "--budget", str(BUDGET), "resources.hosts=2", "resources.host_cpus=0.5")
    result = _run(tmp_path, *arguments, "--address", address, "resources.trial_cpus=0.25")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert load_theta(tmp_path / "data/experiments/tiny-flow/distil/tiny-flow-nfe4.json").solver.nfe == 4
