"""docs/your_model.md, run as it is written on a tiny text-to-image pipeline."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
import yaml
from click.testing import CliRunner

from orchestrator.cli.main import main
from orchestrator.config.reading import load_config
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from solvers.families import GridSolver
from solvers.families.ddim import DDIM
from solvers.grids import UNIFORM


@pytest.fixture(scope="module")
def document(repository: Path) -> str:
    return (repository / "docs/your_model.md").read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, re.S)


@pytest.fixture(scope="module")
def followed(document: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the document's Python defines, after its commands, in a folder as it asks for."""
    folder = tmp_path_factory.mktemp("your_model")
    tiny.stable_diffusion("v_prediction").save_pretrained(folder / "my-pipeline")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs at sea\nan old boat\n", encoding="utf-8")
    names: dict[str, Any] = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first, second, third = blocks(document, "python")
        exec(first, names)
        exec(second, names)
        (command,) = blocks(document, "bash")
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
        exec(third, names)
        (folder / "my-model.yaml").write_text(blocks(document, "yaml")[0], encoding="utf-8")
        names["config"] = load_config(folder / "my-model.yaml")
    return names


def test_the_pipeline_makes_images_with_the_distilled_solver(followed: dict[str, Any]) -> None:
    """The last snippet: an image from as many steps as theta has, and no more."""
    (image,) = followed["images"]
    assert image.size == (tiny.SIDE, tiny.SIDE)
    assert followed["pipe"].scheduler.step_index == followed["nfe"]


def test_the_distilled_solver_beats_the_pipelines_usual_one(followed: dict[str, Any]) -> None:
    """On fresh noise, at the same number of evaluations: half of DDIM's error, or less."""
    model, solver = followed["model"], followed["solver"]
    field = model.field(followed["condition"][:8], followed["guidance_scale"])
    x0 = torch.from_numpy(noise(1, range(8), model.shape))
    truth = solve(field, x0, 1e-3, 1e-3).x1
    ddim = GridSolver(DDIM(), followed["nfe"], UNIFORM).to_ns(model.scheduler)
    with torch.no_grad():
        ours, usual = (float((s.sample(field, x0) - truth).norm()) for s in (solver, ddim))
    assert ours < usual / 2


def test_the_configuration_is_one(followed: dict[str, Any], document: str) -> None:
    """What stands under 'At scale' is accepted as it is, checks of the pipeline included."""
    content = yaml.safe_load(blocks(document, "yaml")[0])
    assert followed["config"].model.options == content["model"]["options"]
