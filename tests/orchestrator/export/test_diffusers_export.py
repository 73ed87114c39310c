"""An exported theta in an unchanged diffusers pipeline gives the same samples as the solver here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image
from torch import Tensor

from orchestrator.datasets.prompts import Prompts
from orchestrator.export.base import ExportError
from orchestrator.export.diffusers import DiffusersScheduler, ns_scheduler
from orchestrator.models.diffusers import DiffusersModel
from solvers.families import GridSolver
from solvers.families.base import Family
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.ns import InvalidThetaError, NSSolver
from solvers.theta import ThetaArtifact

NFE = 6
SIZES = {"height": tiny.SIDE, "width": tiny.SIDE}


def make_theta(model: DiffusersModel, scale: float, family: Family | None = None) -> ThetaArtifact:
    """A theta of NFE evaluations for this model. Heun evaluates twice at the same times."""
    solver = GridSolver(family or Heun(), NFE, Grid("warped", 1.3, 1.2)).to_ns(model.scheduler)
    return ThetaArtifact(
        solver,
        prediction=model.prediction,
        scheduler=model.scheduler.name,
        native_scheduler=model.native.name,
        guidance_scale=scale,
        model_digest=model.digest,
    )


def condition_of(model: DiffusersModel) -> Tensor:
    """The conditioning of the two samples that the tiny pipelines generate."""
    if model.network.encoders:
        return model.encode_conditions(torch.tensor([0, 1]), Prompts(prompts=tuple(tiny.PROMPTS)))
    return torch.tensor(tiny.LABELS) if model.network.guidance != "none" else torch.zeros(2, dtype=torch.int64)


def solver_samples(model: DiffusersModel, artifact: ThetaArtifact, x0: Tensor) -> Tensor:
    """Samples of the artifact's solver on the model's velocity field."""
    with torch.no_grad():
        return artifact.solver.sample(model.field(condition_of(model), artifact.guidance_scale), x0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def ddpm() -> Any:
    return tiny.ddpm("v_prediction")


@pytest.mark.parametrize("family", [Heun(), Midpoint()], ids=lambda family: family.label)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_pipeline_gives_the_solvers_samples(kind: str, family: Family) -> None:
    """Every kind of pipeline, unchanged and with guidance. Agreement is 1e-4, and 1e-5 from the same initial state."""
    make, scale = tiny.KINDS[kind]
    pipe = make()
    model = DiffusersModel.of(pipe, tiny.sample_size(pipe))
    artifact, x0 = make_theta(model, scale, family), tiny.noise(model.shape)
    scheduler = ns_scheduler(artifact, pipe, guidance_scale=scale)
    samples = tiny.run(pipe, scheduler, NFE, scale, model.shape)
    assert relative_error(samples, solver_samples(model, artifact, x0)) < 1e-4
    start = 1.0 if model.scales_start else float(artifact.solver.a[0])
    assert relative_error(samples, solver_samples(model, artifact, x0 / start)) < 1e-5


def test_a_pipeline_without_guidance_gives_the_solvers_samples() -> None:
    """At guidance scale 1 a DiT pipeline does not double its batch."""
    pipe = tiny.dit()
    model = DiffusersModel.of(pipe)
    artifact = make_theta(model, 1.0)
    samples = tiny.run(pipe, ns_scheduler(artifact, pipe), NFE, 1.0, model.shape)
    assert relative_error(samples, solver_samples(model, artifact, tiny.noise(model.shape))) < 1e-4


def test_a_saved_pipeline_keeps_its_theta(tmp_path: Path) -> None:
    """save_pretrained and from_pretrained keep theta bit for bit, the samples and the model digest."""
    pipe = tiny.dit("v_prediction")
    model = DiffusersModel.of(pipe)
    artifact = make_theta(model, 3.0)
    pipe.scheduler = ns_scheduler(artifact, pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.scheduler.solver.flat(), artifact.solver.flat())
    assert loaded.scheduler.config.guidance_scale == 3.0
    assert DiffusersModel.of(loaded).digest == model.digest
    samples = tiny.run(loaded, loaded.scheduler, NFE, 3.0, model.shape)
    torch.testing.assert_close(samples, tiny.run(pipe, pipe.scheduler, NFE, 3.0, model.shape))


def test_the_exporter_adds_one_folder_to_the_pipeline(tmp_path: Path, ddpm: Any) -> None:
    """It writes one file, leaves the pipeline unchanged, and the scheduler loads from that folder."""
    from orchestrator.export.ns_scheduler import NSScheduler

    folder = tmp_path / "pipeline"
    ddpm.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    artifact = make_theta(DiffusersModel(str(folder)), 1.0)
    assert DiffusersScheduler().export(artifact, folder / "bns") == [folder / "bns/scheduler_config.json"]
    assert {path: path.read_bytes() for path in before} == before
    scheduler = NSScheduler.from_pretrained(folder, subfolder="bns")
    assert torch.equal(scheduler.solver.flat(), artifact.solver.flat())


def test_a_theta_of_a_bfloat16_pipeline_is_exported(tmp_path: Path, ddpm: Any) -> None:
    """The dtype is part of the model digest, so the exporter finds the dtype by comparing digests."""
    folder = tmp_path / "pipeline"
    ddpm.save_pretrained(folder)
    artifact = make_theta(DiffusersModel(str(folder), dtype="bfloat16"), 1.0)
    (path,) = DiffusersScheduler().export(artifact, folder / "bns")
    assert str(artifact.model_digest) in path.read_text(encoding="utf-8")


# ---- rejections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"prediction": "epsilon"}, InvalidThetaError, r"made for the prediction 'epsilon', but the pipeline's is 'v_"),
        ({"native_scheduler": "vp"}, InvalidThetaError, r"made for the native scheduler 'vp', but .* 'discrete_vp'"),
        ({"scheduler": "cond_ot"}, InvalidThetaError, r"made for the scheduler 'cond_ot', but .* is 'discrete_vp'"),
        ({"model_digest": "ab" * 32}, InvalidThetaError, r"was made for model abababababab, not for "),
        ({"guidance_scale": 3.0}, ExportError, r"guidance_scale 3, but this DDPMPipeline does not support guidance"),
    ],
)
def test_a_theta_for_another_model_or_setting_is_rejected(
    ddpm: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The artifact records what it was made for; on another pipeline its samples would be wrong."""
    artifact = dataclasses.replace(make_theta(DiffusersModel.of(ddpm), 1.0), **changed)
    with pytest.raises(error, match=message):
        ns_scheduler(artifact, ddpm)


def test_allow_transfer_permits_another_model(ddpm: Any) -> None:
    """As elsewhere, with the argument ``allow_transfer``."""
    artifact = dataclasses.replace(make_theta(DiffusersModel.of(ddpm), 1.0), model_digest="ab" * 32)
    assert ns_scheduler(artifact, ddpm, allow_transfer=True).config.model_digest == "ab" * 32


@pytest.mark.parametrize(
    ("made_for", "asked", "error", "message"),
    [
        (3.0, 4.0, InvalidThetaError, r"made for guidance_scale 3, not 4; call the pipeline with 3, or distil one for"),
        (0.5, None, ExportError, r"guidance_scale 0\.5, but DiTPipeline treats every scale below 1 as unguided"),
    ],
)
def test_an_unsuitable_guidance_scale_is_rejected(
    made_for: float, asked: float | None, error: type[Exception], message: str
) -> None:
    """Guidance happens in the pipeline, where a scheduler cannot see it, so it is checked beforehand."""
    pipe = tiny.dit()
    artifact = make_theta(DiffusersModel.of(pipe), made_for)
    with pytest.raises(error, match=message):
        ns_scheduler(artifact, pipe, guidance_scale=asked)


def test_a_dit_with_another_dropped_label_is_rejected() -> None:
    """DiTPipeline always guides with class 1000, whatever the number of classes."""
    pipe = tiny.dit(classes=10)
    with pytest.raises(ExportError, match=r"guides with class 1000, but this network's dropped label is 10; distil"):
        ns_scheduler(make_theta(DiffusersModel.of(pipe), 3.0), pipe)


def test_a_theta_with_another_initial_state_than_the_pipeline_is_rejected(ddpm: Any) -> None:
    """A DDPM pipeline starts from unscaled noise and ignores the scheduler's init_noise_sigma."""
    artifact = make_theta(DiffusersModel.of(ddpm), 1.0)
    solver = artifact.solver
    moved = dataclasses.replace(artifact, solver=NSSolver(solver.times, 0.9 * solver.a, solver.b))
    with pytest.raises(
        ExportError, match=r"starts from 0\.9 x0, but DDPMPipeline starts from the unscaled noise; distil"
    ):
        ns_scheduler(moved, ddpm)


def test_a_destination_outside_the_pipeline_folder_is_rejected(tmp_path: Path, ddpm: Any) -> None:
    """The scheduler needs the pipeline's betas, and must not replace a component of the pipeline."""
    artifact = make_theta(DiffusersModel.of(ddpm), 1.0)
    folder = tmp_path / "pipeline"
    ddpm.save_pretrained(folder)
    for destination, example in ((tmp_path / "bns", r"PIPELINE/bns"), (folder, r"pipeline/bns")):
        with pytest.raises(ExportError, match=rf"a folder inside the pipeline's folder, .* for example .*{example}"):
            DiffusersScheduler().export(artifact, destination)
    with pytest.raises(ExportError, match=r"scheduler is a component of the pipeline; choose another folder"):
        DiffusersScheduler().export(artifact, folder / "scheduler")


@pytest.fixture
def scheduler(ddpm: Any) -> Any:
    """The exported scheduler of an unconditional pipeline, with its timesteps set."""
    exported = ns_scheduler(make_theta(DiffusersModel.of(ddpm), 1.0), ddpm)
    exported.set_timesteps(NFE)
    return exported


def test_another_number_of_steps_is_rejected(scheduler: Any) -> None:
    """theta has a fixed number of steps, and a pipeline's default differs from it."""
    with pytest.raises(
        ValueError, match=r"this theta has 6 steps, not 50; call the pipeline with num_inference_steps=6"
    ):
        scheduler.set_timesteps(50)


@pytest.mark.parametrize("options", [{"eta": 0.5}, {"use_clipped_model_output": True}])
def test_stochastic_and_clipping_options_are_rejected(scheduler: Any, options: dict[str, Any]) -> None:
    """theta supports neither added noise nor clipping."""
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"theta is deterministic and linear, so eta=.* are not supported; leave them at 0 and"
    ):
        scheduler.step(x, scheduler.timesteps[0], x, **options)


def test_a_start_in_the_middle_is_rejected(scheduler: Any) -> None:
    """Some pipelines cut the timesteps and say so; others only cut them."""
    with pytest.raises(ValueError, match=r"begins at step 3, but theta is a solver of the whole path from pure noise"):
        scheduler.set_begin_index(3)
    x, t = torch.zeros(1, 3, 8, 8), scheduler.timesteps[2]
    with pytest.raises(ValueError, match=rf"begins at timestep {float(t):g}, not at .*, but theta is a solver of the"):
        scheduler.step(x, t, x)


def test_a_state_that_is_changed_between_steps_is_rejected(scheduler: Any) -> None:
    """theta computes the next state from the noise and the velocities, so a change would be lost."""
    x, (first, second, *_) = torch.ones(1, 3, 8, 8), scheduler.timesteps
    state = scheduler.step(x, first, x).prev_sample
    with pytest.raises(ValueError, match=r"was changed before step 2, as inpainting and callbacks do, but theta is a"):
        scheduler.step(x, second, torch.where(torch.arange(8) < 4, state, 0.0))
    copied = scheduler.step(x, second, state.clone()).prev_sample
    assert torch.isfinite(copied).all()


def test_what_a_network_does_to_its_input_does_not_reach_the_scheduler() -> None:
    """Pipelines without guidance pass the state itself to the network, after ``scale_model_input``."""
    pipe = tiny.stable_diffusion()
    model = DiffusersModel.of(pipe)
    artifact = make_theta(model, 1.0)
    expected = tiny.run(pipe, ns_scheduler(artifact, pipe), NFE, 1.0, model.shape)

    def overwrite(module: Any, inputs: Any, output: Any) -> None:
        inputs[0].zero_()

    pipe.unet.register_forward_hook(overwrite)
    assert torch.equal(tiny.run(pipe, ns_scheduler(artifact, pipe), NFE, 1.0, model.shape), expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("sd-epsilon", "StableDiffusionImg2ImgPipeline"),
        ("sd-epsilon", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
        ("flux", "FluxInpaintPipeline"),
    ],
)
def test_pipelines_that_start_from_an_image_are_refused(kind: str, other: str, strength: float) -> None:
    """Real pipelines on the components of those that theta was made for; the sentence names what to use instead."""
    make, scale = tiny.KINDS[kind]
    pipe = make()
    model = DiffusersModel.of(pipe, tiny.sample_size(pipe))
    pipe.scheduler = ns_scheduler(make_theta(model, scale), pipe)
    unchecked = {"requires_safety_checker": False} if kind == "sd-epsilon" else {}
    edits = getattr(diffusers, other)(**pipe.components, **unchecked)
    edits.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (tiny.SIDE, tiny.SIDE))
    mask = {"mask_image": Image.new("L", (tiny.SIDE, tiny.SIDE), 255)} if "Inpaint" in other else {}
    sizes = {} if other in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline") else SIZES
    options = {"image": image, "strength": strength, "num_inference_steps": NFE, "guidance_scale": scale} | sizes | mask
    with pytest.raises(
        ValueError, match=r"theta is a solver of the whole path .* use the pipeline that theta was made"
    ):
        edits(prompt="a cat", output_type="latent", **options)


def test_an_unknown_attribute_of_the_scheduler_names_theta(scheduler: Any) -> None:
    """Pipelines for one class of scheduler ask for its own attributes."""
    assert not hasattr(scheduler, "sigmas")
    with pytest.raises(AttributeError, match=r"NSScheduler has no 'undo_step'; a pipeline that needs it cannot use"):
        scheduler.undo_step(None, None)


def test_a_step_after_the_last_is_rejected(scheduler: Any) -> None:
    """Steps are counted; set_timesteps starts a new sample."""
    x = torch.zeros(1, 3, 8, 8)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"step 7 of a theta of 6 steps; call set_timesteps for a new sample"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prediction_type": "velocity"},
            r"prediction_type 'velocity' is unknown; choose epsilon, sample, v_prediction",
        ),
        ({"prediction_type": "flow_prediction"}, r"flow_prediction takes use_flow_sigmas and no trained_betas"),
        ({"prediction_type": "epsilon"}, r"epsilon and sample take only trained_betas"),
        ({"times": [0.0, 0.5]}, r"an NS solver of n=2 evaluations has times"),
    ],
)
def test_an_invalid_scheduler_configuration_is_rejected(options: dict[str, Any], message: str) -> None:
    """A damaged scheduler_config.json would lead to such arguments."""
    from orchestrator.export.ns_scheduler import NSScheduler

    flow = {"times": [0.0], "a": [1.0, 1.0], "b": [[], [1.0]], "prediction_type": "flow_prediction"}
    flow["use_flow_sigmas"] = "times" in options
    with pytest.raises(ValueError, match=message):
        NSScheduler(**{**flow, **options})
