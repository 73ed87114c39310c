"""Diffusers pipelines: the adapter's velocity field is the one that the pipelines' own samplers integrate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

from orchestrator.datasets.labels import Labels
from orchestrator.datasets.prompts import Prompts
from orchestrator.errors import ConfigError
from orchestrator.hosts.host import Host
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.base import CompiledNetwork
from orchestrator.models.diffusers import NOT_MEASURED, DiffusersModel
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.ground_truth import solve
from orchestrator.storage import Storage
from solvers.schedulers import DiscreteVP

_ADAPTERS: dict[str, DiffusersModel] = {}


def adapter(kind: str) -> DiffusersModel:
    """The adapter of a tiny pipeline, cached per kind."""
    if kind not in _ADAPTERS:
        pipe = tiny.KINDS[kind][0]()
        _ADAPTERS[kind] = DiffusersModel.of(pipe, tiny.sample_size(pipe))
    return _ADAPTERS[kind]


def condition_of(model: DiffusersModel) -> Tensor:
    """The conditioning of the two samples that the tiny pipelines generate."""
    if model.network.encoders:
        return model.encode_conditions(torch.tensor([0, 1]), Prompts(prompts=tuple(tiny.PROMPTS)))
    return torch.tensor(tiny.LABELS) if model.network.guidance != "none" else torch.zeros(2, dtype=torch.int64)


def time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float((actual - expected).norm() / expected.norm())


every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


@every_kind
def test_the_velocity_depends_on_every_input(kind: str) -> None:
    """x, t, condition and guidance each change u by more than 1 %, so the comparisons below test each of them."""
    model, scale = adapter(kind), tiny.KINDS[kind][1]
    condition, x = condition_of(model), tiny.noise(model.shape)
    field = model.field(condition, scale)
    u = field(x, time(0.4))
    changed = {"x": field(1.3 * x, time(0.4)), "t": field(x, time(0.8))}
    if model.network.guidance != "none":
        changed["condition"] = model.field(condition.flip(0), scale)(x, time(0.4))
        changed["guidance"] = model.field(condition, scale + 2)(x, time(0.4))
    assert {name: relative_error(other, u) for name, other in changed.items() if relative_error(other, u) < 0.01} == {}


class _ContinuousDPM(diffusers.EDMDPMSolverMultistepScheduler):
    """Deterministic sampler with the scalings and times of Stable Audio's own sampler, which is stochastic."""

    precondition_noise = diffusers.CosineDPMSolverMultistepScheduler.precondition_noise


def own_sampler(model: DiffusersModel) -> Any:
    """The pipeline's sampler for the same ODE: DDIM to its last trained time, or Euler on the flow's shifted grid."""
    config = model.network.pipe.scheduler.config
    if model.network.is_continuous:
        return _ContinuousDPM(sigma_min=1e-3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction")
    if model.network.is_flow:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
    return diffusers.DDIMScheduler.from_config(config, **options)


@every_kind
def test_the_pipelines_own_sampler_converges_to_the_ground_truth(kind: str) -> None:
    """The unchanged pipeline from the same noise is within 1 % at 200 steps, and closer the more steps it takes."""
    model, scale = adapter(kind), tiny.KINDS[kind][1]
    condition, pipe = condition_of(model), model.network.pipe
    truth = solve(model.field(condition, scale), tiny.noise(model.shape), 1e-4, 1e-4).x1
    errors = [relative_error(tiny.run(pipe, own_sampler(model), n, scale, model.shape), truth) for n in (25, 200)]
    assert errors[1] < 0.01, errors
    assert errors[1] < errors[0] / 2, errors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_trained_timestep_of_ddim_is_one_step_along_the_velocity(prediction: str) -> None:
    """(x_{k-1} - x_k) N is u at timestep k to first order, for each prediction type."""
    pipe = tiny.ddpm(prediction)
    model, k = DiffusersModel.of(pipe), 500
    sampler = own_sampler(model)
    sampler.set_timesteps(1000)
    x = tiny.noise(model.shape)
    with torch.no_grad():
        stepped = sampler.step(pipe.unet(x, k).sample, k, x).prev_sample
        u = model.field(torch.zeros(2, dtype=torch.int64), 1.0)(x, time(1 - (k + 1) / 1000))
    assert relative_error((stepped - x) * 1000, u) < 0.02


@pytest.mark.parametrize("kind", ["ddpm-v", "dit", "sd-epsilon", "sd3", "flux"])
def test_each_sample_may_have_its_own_time(kind: str) -> None:
    """Times of shape (B,) give the same velocities as separate calls."""
    model, scale = adapter(kind), tiny.KINDS[kind][1]
    field, x = model.field(condition_of(model), scale), tiny.noise(model.shape)
    batched = field(x, torch.tensor([0.2, 0.7], dtype=torch.float64))
    separate = torch.stack([field(x, time(0.2))[0], field(x, time(0.7))[1]])
    torch.testing.assert_close(batched, separate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddpm-epsilon", "sd-v", "flux"])
def test_the_velocity_is_differentiable_in_time(kind: str) -> None:
    """The velocity is differentiable in its time, including through the network's timestep."""
    model, scale = adapter(kind), tiny.KINDS[kind][1]
    field, x, h = model.field(condition_of(model), scale), tiny.noise(model.shape).double(), 2e-3
    t = time(0.5).requires_grad_(True)
    (gradient,) = torch.autograd.grad(field(x, t).square().mean(), t)
    after, before = (field(x, time(0.5 + step)).square().mean() for step in (h, -h))
    assert float(gradient) == pytest.approx(float((after - before) / (2 * h)), rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"rescale_betas_zero_snr": True},
    ],
    ids=lambda settings: settings.get("beta_schedule", "zero-snr" if settings else "linear"),
)
def test_the_path_follows_the_pipelines_betas(settings: dict[str, Any]) -> None:
    """alpha^2 at every trained timestep equals the scheduler's alphas_cumprod, for every beta schedule."""
    pipe = tiny.ddpm("v_prediction", **settings)
    native = DiffusersModel.of(pipe).native
    assert isinstance(native, DiscreteVP)
    table = pipe.scheduler.alphas_cumprod.double()
    alpha = native(native.time_of(torch.arange(len(table)))).alpha
    torch.testing.assert_close(alpha**2, table, rtol=0, atol=2e-6)


def test_facts_are_read_from_the_pipeline() -> None:
    """Prediction, path, shape, classes and the cost of an evaluation; none of them is an option."""
    dit, flux, sd = adapter("dit"), adapter("flux"), adapter("sd-v")
    assert (dit.prediction, dit.native.name, dit.shape) == ("epsilon", "discrete_vp", (4, 8, 8))
    assert dit.null_condition(torch.tensor([3, 5])).tolist() == [1000, 1000]
    assert (sd.prediction, flux.prediction, flux.native.name) == ("v_prediction", "velocity", "cond_ot")
    assert [model.forwards_per_evaluation(3.5) for model in (dit, sd, flux)] == [2, 2, 1]
    assert not any(p.requires_grad for p in sd.network.pipe.text_encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "sd-v", "flux"])
def test_the_compiled_network_gives_the_same_velocity(kind: str) -> None:
    """``resources.compile`` works with pipelines: the twin shares the weights, and the model itself stays as it is."""
    model = adapter(kind)
    twin = model.compiled()
    x, condition = tiny.noise(model.shape), condition_of(model)
    with torch.no_grad():
        plain, compiled = (each.field(condition, 1.0)(x, time(0.6)) for each in (model, twin))
    assert relative_error(compiled, plain) < 1e-5
    assert isinstance(twin.network.net, CompiledNetwork)
    assert not isinstance(model.network.net, CompiledNetwork)
    assert next(twin.network.net.parameters()) is next(model.network.net.parameters())


def test_the_parts_of_a_condition_are_packed_and_unpacked() -> None:
    """SDXL's token embeddings, pooled embedding and sizes are packed into one vector and unpacked unchanged."""
    network: Any = adapter("sdxl").network
    condition = network.encode(tiny.PROMPTS)
    assert network.layout == {"prompt_embeds": (20, 32), "pooled_prompt_embeds": (16,), "time_ids": (6,)}
    embeddings, _, pooled, _ = network.pipe.encode_prompt(prompt=tiny.PROMPTS, device="cpu")
    parts = network.unpack(condition)
    torch.testing.assert_close(parts["prompt_embeds"], embeddings)
    torch.testing.assert_close(parts["pooled_prompt_embeds"], pooled)
    assert parts["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_latents_are_decoded_as_by_the_pipeline(kind: str) -> None:
    """The VAE's scale and shift come from the pipeline's configuration."""
    model = adapter(kind)
    vae, latents = model.network.pipe.vae, tiny.noise(model.shape)
    shift = {"dit": 0.0, "sd3": 0.06}[kind]
    expected = vae.decode(latents / {"dit": 0.18215, "sd3": 1.5}[kind] + shift).sample
    torch.testing.assert_close(model.decode(latents), expected)


def test_pixel_models_decode_to_the_sample_itself() -> None:
    """A pixel-space model has no decoder."""
    model = adapter("ddpm-v")
    x = tiny.noise(model.shape)
    assert torch.equal(model.decode(x), x)


# ---- folders and digests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text pipeline in its real file format."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


def test_a_saved_pipeline_equals_the_one_in_memory(saved_pipeline: Path) -> None:
    """It has the same digest and velocity: weights, tokenizer and betas survive the file format."""
    model, memory = DiffusersModel(str(saved_pipeline)), adapter("sd-epsilon")
    assert (model.name, model.digest) == ("sd", memory.digest)
    x = tiny.noise(model.shape)
    actual, expected = (m.field(condition_of(m), 3.0)(x, time(0.3)) for m in (model, memory))
    torch.testing.assert_close(actual, expected)


def test_the_digest_depends_on_the_velocity_and_not_on_the_sampler() -> None:
    """Another sampler on the same betas is the same model; other betas, prediction or dtype are another."""
    pipe, digest = tiny.ddpm(), adapter("ddpm-epsilon").digest
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert DiffusersModel.of(pipe).digest == digest
    others = [tiny.ddpm(beta_end=0.019), tiny.ddpm("v_prediction"), tiny.ddpm().to(torch.bfloat16)]
    assert digest not in [DiffusersModel.of(other).digest for other in others]


CHANGED_PARTS: dict[str, Callable[[Any], object]] = {
    "unet": lambda pipe: pipe.unet.conv_out.bias.data.add_(1),
    "text_encoder": lambda pipe: next(pipe.text_encoder.parameters()).data.add_(1),
    "vae": lambda pipe: pipe.vae.decoder.conv_out.bias.data.add_(1),
    "the VAE's scale": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
    "tokenizer": lambda pipe: setattr(pipe.tokenizer, "model_max_length", 19),
    "the tokenizer's words": lambda pipe: pipe.tokenizer.add_tokens(["fox"]),
}


def test_every_component_of_a_pipeline_is_changed_here() -> None:
    """A component that takes part in what is measured is part of the digest."""
    assert {*CHANGED_PARTS} | {*NOT_MEASURED} >= {*tiny.stable_diffusion().components}


@pytest.mark.parametrize("part", CHANGED_PARTS)
def test_a_change_of_any_part_of_a_pipeline_changes_the_digest(part: str) -> None:
    """The decoder as well: metrics look at decoded samples."""
    pipe = tiny.stable_diffusion()
    CHANGED_PARTS[part](pipe)
    assert DiffusersModel.of(pipe).digest != DiffusersModel.of(tiny.stable_diffusion()).digest


def test_the_digest_is_the_same_after_texts_were_encoded() -> None:
    """Encoding sets the tokenizer's padding and truncation."""
    pipe = tiny.stable_diffusion()
    before = DiffusersModel.of(pipe)
    before.network.encode(list(tiny.PROMPTS))
    assert DiffusersModel.of(pipe).digest == before.digest


def test_a_pipeline_runs_in_the_requested_dtype(saved_pipeline: Path) -> None:
    """bfloat16 networks with float32 states give nearly the same velocity."""
    half, full = DiffusersModel(str(saved_pipeline), dtype="bfloat16"), adapter("sd-epsilon")
    x = tiny.noise(full.shape)
    velocity = half.field(condition_of(half), 1.0)(x, time(0.4))
    assert velocity.dtype == torch.float32
    assert 0 < relative_error(velocity, full.field(condition_of(full), 1.0)(x, time(0.4))) < 0.05


def test_pairs_store_the_encoded_prompts(saved_pipeline: Path, tmp_path: Path) -> None:
    """A host encodes each pair's prompt once; the stored encoding is all that the network needs later."""
    host = Host(HostSettings(adapter="diffusers", options={"pipeline": str(saved_pipeline)}, storage=str(tmp_path)))
    options = {"prompts": tiny.PROMPTS}
    spec = PairSpec(
        model_digest=host.model.digest,
        conditioning={"name": "prompts", "options": options},
        content=Prompts(**options).content,
        guidance_scale=3.0,
        shape=host.model.shape,
        seed=0,
        count=4,
        batch_size=2,
        shard_size=4,
        rtol=1e-2,
        atol=1e-2,
        device_class="cpu",
    )
    store = PairStore(Storage.at(tmp_path), spec)
    store.commit([host.make_shard(spec, 0, spec.made)])
    stored, prompts = store.load().condition, Prompts(prompts=tuple(tiny.PROMPTS))
    drawn = torch.from_numpy(prompts.conditions(0, range(4)))
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored, host.model.encode_conditions(drawn, prompts))  # type: ignore[attr-defined]
    assert set(drawn.tolist()) == {0, 1}


# ---- rejections ---------------------------------------------------------------------------------------------------


def test_a_hub_id_that_cannot_be_fetched_is_rejected_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, the check itself fails and says what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"'nobody/nothing' is not a folder here and could not be fetched .*`hf download"
    ):
        DiffusersModel.check({"pipeline": "nobody/nothing"})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"holds no model_index\.json, so it is not a pipeline; make one with pipe\.save_pretrained"),
        ("{", r"model_index\.json is not JSON .* download or save the pipeline again"),
        (
            json.dumps({"_class_name": "WanPipeline"}),
            r"is a WanPipeline, which has no adapter; there are adapters for ",
        ),
    ],
)
def test_an_unusable_folder_is_rejected(tmp_path: Path, index: str | None, message: str) -> None:
    """It is rejected before anything is loaded."""
    if index is not None:
        (tmp_path / "model_index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        DiffusersModel.check({"pipeline": str(tmp_path)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"takes the options 'pipeline' \(a folder or a hub id\), 'dtype', 'sample_size' and 'variant'; got \{\}"),
        ({"pipeline": "x", "shift": 3}, r"takes the options 'pipeline' .* got \{'pipeline': 'x', 'shift': 3\}"),
        ({"pipeline": "x", "dtype": "int8"}, r"dtype 'int8' is unknown; choose one of float32, bfloat16, float16"),
        ({"pipeline": "x", "sample_size": 0}, r"sample_size must be a positive integer, got 0"),
        ({"pipeline": "/nowhere/at/all"}, r"no pipeline folder at /nowhere/at/all, and it is not a hub id"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    """They are rejected before anything is looked up."""
    with pytest.raises(ConfigError, match=message):
        DiffusersModel.check(options)


def test_a_pipeline_without_its_weights_is_rejected(tmp_path: Path) -> None:
    """The class is supported, but files are missing."""
    tiny.ddpm().save_pretrained(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"unet holds no weights .*; download or save the pipeline again"):
        DiffusersModel(str(tmp_path))


def _with_scheduler(pipe: Any, scheduler: Any) -> Any:
    pipe.scheduler = scheduler
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny.ddpm(rescale_betas_zero_snr=True),
            r"zero terminal SNR .* but predicts epsilon, .* check prediction_type",
        ),
        (
            lambda: _with_scheduler(tiny.ddpm(), diffusers.EDMEulerScheduler()),
            r"scheduler EDMEulerScheduler has prediction_type 'epsilon'; supported are",
        ),
        (
            lambda: _with_scheduler(tiny.ddpm(), diffusers.FlowMatchEulerDiscreteScheduler()),
            r"is for a prediction of 'flow_prediction', but its network is a diffusion model",
        ),
        (
            lambda: tiny.ddpm(class_labels=True),
            r"UNet2DModel .* has num_class_embeds=4, so it needs class labels, which",
        ),
    ],
)
def test_a_pipeline_with_an_undetermined_velocity_is_rejected(make: Any, message: str) -> None:
    """A guess at prediction, path or inputs could be silently wrong."""
    with pytest.raises(ConfigError, match=message):
        DiffusersModel.of(make())


@pytest.mark.parametrize("kind", ["ddpm-v", "schnell"])
def test_guidance_of_a_model_without_guidance_is_rejected(kind: str) -> None:
    """Unconditional models and FLUX schnell are sampled at guidance scale 1."""
    model = DiffusersModel.of(tiny.flux(False), 8) if kind == "schnell" else adapter(kind)
    with pytest.raises(ConfigError, match=r"guidance_scale is 3, but .* does not support guidance; set it to 1"):
        model.field(torch.zeros(2, 1), 3.0)


@pytest.mark.parametrize(
    ("kind", "condition", "message"),
    [
        ("dit", torch.tensor([4, 1000]), r"label 1000 is not one of this model's 1000 classes; set condit"),
        (
            "ddpm-v",
            torch.tensor([0, 2]),
            r"label 2 for a model without classes; set conditioning\.options\.classes to 1",
        ),
        (
            "sd-v",
            torch.tensor([0, 2]),
            r"conditioning has shape \(2,\) .* takes 320 numbers per prompt; set conditioning\.",
        ),
    ],
)
def test_conditioning_that_does_not_fit_the_model_is_rejected(kind: str, condition: Tensor, message: str) -> None:
    """Labels outside the classes, and labels for a text model."""
    with pytest.raises(ConfigError, match=message):
        adapter(kind).check_condition(condition)


@pytest.mark.parametrize(
    ("kind", "dataset", "message"),
    [
        ("sd-v", Labels(), r"is a text model, so Labels does not fit it; set conditioning\.name to prompts"),
        ("dit", Prompts(), r"is not a text model, so Prompts does not fit it; set conditioning\.name to labels"),
    ],
)
def test_a_dataset_of_the_wrong_kind_is_rejected(kind: str, dataset: Any, message: str) -> None:
    """Text models take prompts; all others take labels."""
    with pytest.raises(ConfigError, match=message):
        adapter(kind).encode_conditions(torch.tensor([0]), dataset)


def test_flux_rejects_an_odd_sample_size() -> None:
    """FLUX packs latents in 2x2 patches."""
    with pytest.raises(ConfigError, match=r"sample_size is 9, but FLUX packs latents in 2x2 patches; give an even"):
        DiffusersModel.of(tiny.flux(), 9)


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines: a flow, a text diffusion model, and one on the continuous path."""
    saved_folders = {}
    for kind in ("sd3", "sd-epsilon", "stable-audio"):
        saved_folders[kind] = tmp_path_factory.mktemp(kind)
        adapter(kind).network.pipe.save_pretrained(saved_folders[kind])
    return saved_folders


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("sd3", {"_class_name": "DDIMScheduler"}, r"scheduler DDIMScheduler is for a prediction of 'epsilon', .* flow"),
        (
            "sd-epsilon",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            r"for a prediction of 'flow_pred.* diffusion",
        ),
        (
            "sd-epsilon",
            {"prediction_type": "noise"},
            r"has prediction_type 'noise'; supported are epsilon, sample and v_pred",
        ),
        (
            "stable-audio",
            {"prediction_type": "epsilon"},
            r"trained for v_prediction and 1\.0; give it the scheduler it wa",
        ),
        (
            "stable-audio",
            {"sigma_data": 0.5},
            r"and sigma_data 0\.5, but its network was trained for v_prediction and 1",
        ),
    ],
)
def test_a_scheduler_that_contradicts_its_network_is_rejected_from_the_files(
    saved_folders: dict[str, Path], tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    """The configuration check reads no weights and starts no actor."""
    folder = tmp_path / kind
    (folder / "scheduler").mkdir(parents=True)
    index = json.loads((saved_folders[kind] / "model_index.json").read_text())
    scheduler_config = json.loads((saved_folders[kind] / "scheduler/scheduler_config.json").read_text())
    index["scheduler"][1] = config.get("_class_name", index["scheduler"][1])
    if "_class_name" in config:
        scheduler_config.pop("prediction_type", None)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**scheduler_config, **config}))
    with pytest.raises(ConfigError, match=message):
        DiffusersModel.check({"pipeline": str(folder)})


@pytest.mark.parametrize(
    ("kind", "dataset", "message"),
    [
        ("sd3", Labels(), r"is a text model, so Labels does not fit it; set conditioning\.name to prompts"),
        (
            "stable-audio",
            Labels(),
            r"is a text model, so Labels does not fit it; set conditioning\.name to prompts",
        ),
    ],
)
def test_conditioning_of_the_wrong_kind_is_rejected_from_the_files(
    saved_folders: dict[str, Path], kind: str, dataset: Any, message: str
) -> None:
    """It is rejected before any actor starts."""
    options = {"pipeline": str(saved_folders[kind])}
    DiffusersModel.check(options)
    DiffusersModel.check_conditioning(options, Prompts())
    with pytest.raises(ConfigError, match=message):
        DiffusersModel.check_conditioning(options, dataset)


def test_audio_is_decoded_by_the_pipelines_own_decoder() -> None:
    """Latent frames become audio samples exactly as in the pipeline."""
    model = adapter("stable-audio")
    pipe, latents = model.network.pipe, tiny.noise(model.shape)
    audio = model.decode(latents)
    with torch.no_grad():
        torch.testing.assert_close(audio, pipe.vae.decode(latents).sample)
    assert audio.shape == (2, 1, model.shape[1] * pipe.vae.hop_length)


def test_the_length_of_audio_is_fixed_by_the_model() -> None:
    """The pipeline always samples all frames, so sample_size must be left out."""
    with pytest.raises(ConfigError, match=r"sample_size is 4, but StableAudioPipeline always samples 8 frames; leave"):
        DiffusersModel.of(adapter("stable-audio").network.pipe, sample_size=4)
