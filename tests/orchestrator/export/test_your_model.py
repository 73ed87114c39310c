"""The section on diffusers in docs/your_model.md, run verbatim on a tiny text-to-image pipeline."""

from __future__ import annotations

import dataclasses
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
from solvers.guided import GuidedSolver
from solvers.theta import load_theta


@pytest.fixture(scope="module")
def document(repository: Path) -> str:
    text = (repository / "docs/your_model.md").read_text(encoding="utf-8")
    return text.partition("\n## A network of your own\n")[0]


def code_blocks(document: str, language: str) -> list[str]:
    """The code blocks of the document in one language."""
    return re.findall(rf"```{language}\n(.*?)```", document, re.S)


@pytest.fixture(scope="module")
def document_names(document: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names defined by the document's Python code, run with its commands in a folder prepared as it asks."""
    folder = tmp_path_factory.mktemp("your_model")
    tiny.stable_diffusion("v_prediction").save_pretrained(folder / "my-pipeline")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs at sea\nan old boat\n", encoding="utf-8")
    names: dict[str, Any] = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first, second, third, ranged = code_blocks(document, "python")
        exec(first, names)
        exec(second, names)
        (command,) = code_blocks(document, "bash")
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
        exec(third, names)
        one = load_theta("theta.json")
        solvers = GuidedSolver(one.solver, one.solver, (1.0, 5.0))
        dataclasses.replace(one, solver=solvers, family="bns_guided", guidance_scale=None).save("ranged.json")
        done = CliRunner().invoke(main, ["export", "ranged.json", "--to", "diffusers", "my-pipeline/bns"])
        assert done.exit_code == 0, done.output
        exec(ranged.replace("num_inference_steps=8", f"num_inference_steps={one.solver.nfe}"), names)
        (folder / "my-model.yaml").write_text(code_blocks(document, "yaml")[0], encoding="utf-8")
        names["config"] = load_config(folder / "my-model.yaml")
    return names


def test_the_pipeline_generates_images_with_the_distilled_solver(document_names: dict[str, Any]) -> None:
    """The last snippet makes an image in exactly as many steps as theta has."""
    (image,) = document_names["images"]
    assert image.size == (tiny.SIDE, tiny.SIDE)
    assert document_names["pipe"].scheduler.step_index == document_names["nfe"]


def test_the_distilled_solver_beats_the_pipelines_default(document_names: dict[str, Any]) -> None:
    """On fresh noise at the same number of evaluations, its error is at most half of DDIM's."""
    model, solver = document_names["model"], document_names["solver"]
    field = model.field(document_names["condition"][:8], document_names["guidance_scale"])
    x0 = torch.from_numpy(noise(1, range(8), model.shape))
    truth = solve(field, x0, 1e-3, 1e-3).x1
    ddim = GridSolver(DDIM(), document_names["nfe"], UNIFORM).to_ns(model.scheduler)
    with torch.no_grad():
        our_error, ddim_error = (float((s.sample(field, x0) - truth).norm()) for s in (solver, ddim))
    assert our_error < ddim_error / 2


def test_the_documents_configuration_is_valid(document_names: dict[str, Any], document: str) -> None:
    """The configuration under 'At scale' is valid as printed, including the checks of the pipeline."""
    options = yaml.safe_load(code_blocks(document, "yaml")[0])["model"]["options"]
    here = {"pipeline": str(document_names["folder"] / options["pipeline"])}
    assert document_names["config"].model.options == options | here
