"""Pipeline folders as people have them: variants of the weights, .bin files, and no sample_size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch

from orchestrator.errors import ConfigError
from orchestrator.export.diffusers import DiffusersScheduler
from orchestrator.models.diffusers import DiffusersModel
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.theta import ThetaArtifact


def saved(folder: Path, pipe: Any = None, **how: Any) -> Path:
    """The folder, with a DDPM pipeline saved in it."""
    (pipe or tiny.ddpm()).save_pretrained(folder, **how)
    return folder


def theta_of(model: DiffusersModel) -> ThetaArtifact:
    """Two steps of midpoint for this model."""
    return ThetaArtifact(
        GridSolver(Midpoint(), 4, Grid()).to_ns(model.scheduler),
        prediction=model.prediction,
        scheduler=model.scheduler.name,
        native_scheduler=model.native.name,
        guidance_scale=1.0,
        model_digest=model.digest,
    )


@pytest.mark.parametrize("how", [{"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "2KB"}])
def test_the_only_weights_of_a_folder_are_loaded(tmp_path: Path, how: dict[str, Any]) -> None:
    """A variant alone, tensor-only .bin files, and weights in several files: the same model as in memory."""
    pipe = tiny.ddpm()
    assert DiffusersModel(str(saved(tmp_path / "pipe", pipe, **how))).digest == DiffusersModel.of(pipe).digest


def test_a_text_model_of_a_variant_is_loaded(tmp_path: Path) -> None:
    """The text encoder's files are variants too."""
    pytest.importorskip("transformers")
    pipe = tiny.stable_diffusion()
    folder = saved(tmp_path / "pipe", pipe, variant="fp16")
    assert not list(folder.rglob("model.safetensors"))
    assert DiffusersModel(str(folder)).digest == DiffusersModel.of(pipe).digest


def test_of_several_variants_the_option_chooses(tmp_path: Path) -> None:
    """Without it, the weights without a variant; a theta of either is exported into the folder of both."""
    folder = saved(tmp_path / "pipe")
    plain = DiffusersModel(str(folder))
    other = tiny.ddpm()
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    saved(folder, other, variant="ema")
    assert DiffusersModel(str(folder)).digest == plain.digest
    chosen = DiffusersModel(str(folder), variant="ema")
    assert chosen.digest == DiffusersModel.of(other).digest != plain.digest
    for model in (plain, chosen):
        (path,) = DiffusersScheduler().export(theta_of(model), folder / "bns")
        assert model.digest in path.read_text(encoding="utf-8")


def test_a_variant_that_is_not_there_is_refused_before_loading(tmp_path: Path) -> None:
    """The message lists those that are there; so it does if there are several and none is chosen."""
    folder = saved(tmp_path / "pipe")
    saved(folder, variant="fp16")
    with pytest.raises(
        ConfigError, match=r"unet has no weights of the variant 'bf16', only of fp16, those without a va"
    ):
        DiffusersModel.check({"pipeline": str(folder), "variant": "bf16"})
    saved(folder, variant="ema")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"unet has weights only as variants ema, fp16; set variant to one of them"):
        DiffusersModel.check({"pipeline": str(folder)})
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"unet holds no weights \(diffusion_pytorch_model\.safetensors or \.bin\)"):
        DiffusersModel.check({"pipeline": str(folder)})
    with pytest.raises(ConfigError, match=r"variant must be a word such as fp16, got '\.\./x'"):
        DiffusersModel.check({"pipeline": str(folder), "variant": "../x"})


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_a_bin_file_runs_no_code(tmp_path: Path) -> None:
    """A pickle of more than tensors is refused."""
    folder = saved(tmp_path / "pipe", safe_serialization=False)
    torch.save({"conv_in.weight": Command(tmp_path / "ran")}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        DiffusersModel(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_network_without_a_sample_size_needs_the_option(tmp_path: Path) -> None:
    """A fully convolutional network takes any size, and some configurations leave it null."""
    pipe = tiny.ddpm()
    folder = saved(tmp_path / "pipe", pipe)
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": None}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json has no sample_size; set the option sample_size to the height"):
        DiffusersModel.check({"pipeline": str(folder)})
    model = DiffusersModel(str(folder), sample_size=4)
    assert model.shape == (pipe.unet.config.in_channels, 4, 4)
    assert model.predict(torch.zeros(1, *model.shape), torch.tensor(0.5), torch.zeros(1)).shape == (1, *model.shape)


def test_guidance_of_an_unconditional_pipeline_is_refused_from_the_options(tmp_path: Path) -> None:
    """It would take two equal forwards per evaluation."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}', encoding="utf-8")
    options = {"pipeline": str(tmp_path)}
    DiffusersModel.check_guidance(options, 1.0)
    with pytest.raises(ConfigError, match=r"guidance scale 3 has no effect on .*; set guidance_scale to 1"):
        DiffusersModel.check_guidance(options, 3.0)
