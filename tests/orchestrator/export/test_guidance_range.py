"""A theta for a range of guidance scales is exported whole: every format takes any scale inside and refuses others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from click.testing import CliRunner
from test_diffusers_export import condition_of, make_theta, relative_error
from test_export import names_in, noise, velocity
from torch import Tensor

from orchestrator.cli.main import main
from orchestrator.export.base import ExportError
from orchestrator.export.diffusers import DiffusersScheduler, ns_scheduler
from orchestrator.export.python import PythonFile
from orchestrator.export.safetensors import Safetensors
from orchestrator.models.diffusers import DiffusersModel
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.guided import GuidedSolver
from solvers.ns import InvalidThetaError
from solvers.theta import ThetaArtifact, load_theta

NFE = 6
LOW, HIGH = 1.0, 5.0
OUTSIDE = r"guidance_scale 6 is outside the range that this theta was made for, 1 to 5"


def ranged(model: DiffusersModel, low: float = LOW, high: float = HIGH) -> ThetaArtifact:
    """A theta for this model whose solver turns from Heun into Midpoint as guidance rises."""
    lower, upper = make_theta(model, low, Heun()), make_theta(model, high, Midpoint())
    return ThetaArtifact(
        GuidedSolver(lower.solver, upper.solver, (low, high)),
        family="bns_guided",
        prediction=lower.prediction,
        scheduler=lower.scheduler,
        native_scheduler=lower.native_scheduler,
        model_digest=lower.model_digest,
    )


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def model(pipe: Any) -> DiffusersModel:
    return DiffusersModel.of(pipe)


@pytest.fixture(scope="module")
def artifact(model: DiffusersModel) -> ThetaArtifact:
    return ranged(model)


def expected(model: DiffusersModel, artifact: ThetaArtifact, scale: float) -> Tensor:
    """Samples of the solver at one scale, on the model's velocity at this scale."""
    solver, x0 = artifact.at(guidance_scale=scale).solver, tiny.noise(model.shape)
    with torch.no_grad():
        return solver.sample(model.field(condition_of(model), scale), x0)


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5, 5.0])
def test_the_python_file_samples_at_any_scale_in_the_range(
    artifact: ThetaArtifact, tmp_path: Path, scale: float
) -> None:
    """Its samples are those of the solver at this scale."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    samples = names_in(path)["sample"](velocity, noise(), scale)
    solver = artifact.at(guidance_scale=scale).solver
    torch.testing.assert_close(samples, solver.sample(velocity, noise()), rtol=1e-12, atol=1e-12)


def test_the_python_file_refuses_other_scales_and_needs_no_packages(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """It runs in an interpreter without site-packages, and takes numpy arrays without widening them."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    names = names_in(path)
    for scale in (0.9, 6, float("nan")):
        with pytest.raises(
            ValueError, match=rf"guidance_scale {scale} is outside the range of this solver, 1.0 to 5.0"
        ):
            names["sample"](velocity, noise(), scale)
    assert names["sample"](velocity, noise().numpy().astype(np.float32), 2.0).dtype == np.float32
    code = "import sys; sys.path.insert(0, '.'); import sampler; print(sampler.sample(lambda x, t: -x * t, 2.0, 3))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    solver = artifact.at(guidance_scale=3).solver
    of_solver = solver.sample(lambda x, t: -x * t, torch.tensor([2.0], dtype=torch.float64))
    assert float(done.stdout) == pytest.approx(float(of_solver), rel=1e-12), done.stderr


def test_the_safetensors_file_is_read_back_whole(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """Both ends and the range, bit for bit."""
    (path,) = Safetensors().export(artifact, tmp_path / "theta.safetensors")
    loaded = load_theta(path)
    assert (loaded.digest, loaded.guidance_range, loaded.to_json()) == (
        artifact.digest,
        (LOW, HIGH),
        artifact.to_json(),
    )


def test_the_command_exports_a_range_or_one_scale_of_it(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """``--guidance-scale`` chooses one; a scale outside the range is refused in a sentence."""
    artifact.save(tmp_path / "theta.json")

    def export(*options: str) -> Any:
        arguments = ["export", str(tmp_path / "theta.json"), "--to", "python", str(tmp_path / "sampler.py"), *options]
        return CliRunner().invoke(main, arguments)

    assert export().exit_code == 0
    assert names_in(tmp_path / "sampler.py")["GUIDANCE_RANGE"] == (LOW, HIGH)
    assert export("--guidance-scale", "2.5").exit_code == 0
    names = names_in(tmp_path / "sampler.py")
    assert (names["GUIDANCE_SCALE"], names["A"]) == (2.5, tuple(artifact.at(guidance_scale=2.5).solver.a.tolist()))
    refused = export("--guidance-scale", "6")
    assert refused.exit_code != 0
    assert "guidance_scale 6 is outside the range" in refused.output
    assert "Traceback" not in refused.output


# ---- diffusers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.5, 3.0, 5.0])
def test_the_scale_of_a_call_reaches_the_solver(
    pipe: Any, model: DiffusersModel, artifact: ThetaArtifact, scale: float
) -> None:
    """A pipeline that states its guidance scale needs no second mention of it; calls may differ in scale."""
    scheduler = ns_scheduler(artifact, pipe)
    samples = tiny.run(pipe, scheduler, NFE, scale, model.shape)
    assert relative_error(samples, expected(model, artifact, scale)) < 1e-4
    again = tiny.run(pipe, scheduler, NFE, 2.0, model.shape)
    assert relative_error(again, expected(model, artifact, 2.0)) < 1e-4


def test_a_call_outside_the_range_or_of_another_scale_is_refused(pipe: Any, model: DiffusersModel) -> None:
    """Before the first evaluation; also if the scale was chosen beforehand, for a range or for a theta of one scale."""
    artifact = ranged(model)
    with pytest.raises(InvalidThetaError, match=OUTSIDE):
        tiny.run(pipe, ns_scheduler(artifact, pipe), NFE, 6.0, model.shape)
    chosen = ns_scheduler(artifact, pipe, guidance_scale=2.0)
    remedy = (
        r"called with guidance_scale 4, but its scheduler is for 2; call it with guidance_scale=2, or set pipe\.sch"
    )
    with pytest.raises(InvalidThetaError, match=remedy):
        tiny.run(pipe, chosen, NFE, 4.0, model.shape)
    samples = tiny.run(pipe, chosen.at(4.0), NFE, 4.0, model.shape)
    assert relative_error(samples, expected(model, artifact, 4.0)) < 1e-4
    single = ns_scheduler(make_theta(model, 3.0), pipe)
    with pytest.raises(
        InvalidThetaError, match=r"guidance_scale 4, but its scheduler is for 3; call it with guidance_sca"
    ):
        tiny.run(pipe, single, NFE, 4.0, model.shape)
    with pytest.raises(InvalidThetaError, match=r"made for guidance_scale 3, not 4; call the pipeline with 3"):
        single.at(4.0)


def test_a_pipeline_that_keeps_its_scale_to_itself_needs_it_named(tmp_path: Path) -> None:
    """DiT's; and any pipeline that was saved, whose scheduler does not know it. The message says what to do."""
    pipe = tiny.dit()
    model = DiffusersModel.of(pipe)
    artifact = ranged(model)
    with pytest.raises(InvalidThetaError, match=r"choose it first: pipe\.scheduler = pipe\.scheduler\.at\(5\)"):
        tiny.run(pipe, ns_scheduler(artifact, pipe), NFE, 3.0, model.shape)
    scheduler = ns_scheduler(artifact, pipe, guidance_scale=3.0)
    assert relative_error(tiny.run(pipe, scheduler, NFE, 3.0, model.shape), expected(model, artifact, 3.0)) < 1e-4
    pipe.scheduler = ns_scheduler(artifact, pipe)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    with pytest.raises(InvalidThetaError, match="choose it first"):
        tiny.run(loaded, loaded.scheduler, NFE, 3.0, model.shape)
    with pytest.raises(InvalidThetaError, match=OUTSIDE):
        loaded.scheduler.at(6)
    samples = tiny.run(loaded, loaded.scheduler.at(2), NFE, 2.0, model.shape)
    assert relative_error(samples, expected(model, artifact, 2.0)) < 1e-4


def test_the_scheduler_folder_holds_the_range(tmp_path: Path, pipe: Any, artifact: ThetaArtifact) -> None:
    """It loads with both ends, and the user names the scale."""
    from orchestrator.export.ns_scheduler import NSScheduler

    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    (path,) = DiffusersScheduler().export(artifact, folder / "bns")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["guidance_range"], content["guidance_scale"]) == ([LOW, HIGH], None)
    scheduler = NSScheduler.from_pretrained(folder, subfolder="bns").at(2.5)
    assert torch.equal(scheduler.solver.flat(), artifact.at(guidance_scale=2.5).solver.flat())
    assert scheduler.config.guidance_scale == 2.5


def test_a_range_that_the_pipeline_cannot_guide_is_refused(pipe: Any, model: DiffusersModel) -> None:
    """Both ends are checked."""
    with pytest.raises(ExportError, match=r"guidance_scale 0\.5, but .* treats every scale below 1 as unguided"):
        ns_scheduler(ranged(model, low=0.5), pipe)
    with pytest.raises(InvalidThetaError, match=OUTSIDE):
        ns_scheduler(ranged(model), pipe, guidance_scale=6.0)
    unguided = tiny.ddpm("v_prediction")
    with pytest.raises(ExportError, match=r"guidance_scale 5, but this DDPMPipeline does not support guidance"):
        ns_scheduler(ranged(DiffusersModel.of(unguided)), unguided)
