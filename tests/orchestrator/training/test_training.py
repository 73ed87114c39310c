"""Training of zoo models: it is resumable and reproducible, and the trained model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.models.zoo import ZooModel
from orchestrator.models.zoo.adapter import WEIGHTS
from orchestrator.training.sheet import ENLARGED, PER_CLASS, STRINGS, write_sheet
from orchestrator.training.zoo import PretrainConfig, train


def _recipe(storage: Path, **changes: Any) -> PretrainConfig:
    """A tiny pretraining configuration, with changes."""
    content = {
        "name": "tiny",
        "architecture": {
            "net": "film_mlp",
            "shape": [1, 8, 8],
            "classes": 10,
            "width": 8,
            "depth": 1,
            "condition_width": 8,
            "dropout": 0.1,
        },
        "prediction": "velocity",
        "scheduler": "cond_ot",
        "iterations": 6,
        "batch_size": 16,
        "checkpoint_every": 2,
        "threads": 1,
        "storage": str(storage),
    }
    return PretrainConfig(**{**content, **changes})


def _silent(iteration: int, loss: float) -> None:
    """Progress callback that only checks the loss."""
    assert loss > 0


def _interrupt_at(last: int) -> Any:
    """Progress callback that interrupts training at iteration ``last``."""

    def progress(iteration: int, loss: float) -> None:
        if iteration == last:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("prediction", "scheduler"), [("velocity", "cond_ot"), ("v_prediction", "cosine"), ("epsilon", "vp")]
)
def test_a_trained_model_loads_as_a_zoo_model(tmp_path: Path, prediction: str, scheduler: str) -> None:
    """For each parametrisation: weights and card are written, the velocity is finite, and the checkpoint is removed."""
    recipe = _recipe(tmp_path / "storage", prediction=prediction, scheduler=scheduler, iterations=3)
    facts = train(recipe, tmp_path / "out", _silent)
    model = ZooModel(str(tmp_path / "out/tiny.safetensors"))
    assert (model.prediction, model.native.name, model.data_range) == (prediction, scheduler, 2.0)
    velocity = model.field(torch.tensor([1]), 3.0)(torch.zeros(1, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64))
    assert torch.isfinite(velocity).all()
    card = (tmp_path / "out/tiny.md").read_text(encoding="utf-8")
    assert f"{facts['parameters']:,} parameters" in card
    assert f"held out {facts['validation_loss']:.4f}" in card
    assert not list((tmp_path / "storage").rglob("*.pt"))


@pytest.mark.parametrize("last", [3, 5])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, last: int) -> None:
    """It resumes from the last checkpoint, and the weights are bit-identical, dropout included."""
    train(_recipe(tmp_path / "undisturbed"), tmp_path / "a", _silent)
    with pytest.raises(KeyboardInterrupt):
        train(_recipe(tmp_path / "killed"), tmp_path / "b", _interrupt_at(last))
    assert not (tmp_path / "b/tiny.safetensors").exists()
    iterations: list[int] = []
    train(_recipe(tmp_path / "killed"), tmp_path / "b", lambda iteration, loss: iterations.append(iteration))
    assert iterations[0] == last - last % 2 + 1
    assert (tmp_path / "b/tiny.safetensors").read_bytes() == (tmp_path / "a/tiny.safetensors").read_bytes()


def test_a_checkpoint_of_another_recipe_is_rejected(tmp_path: Path) -> None:
    """Resuming under another recipe would give a model that its card does not describe."""
    with pytest.raises(KeyboardInterrupt):
        train(_recipe(tmp_path), tmp_path / "out", _interrupt_at(3))
    with pytest.raises(
        ConfigError,
        match=r"the checkpoint of 'tiny' was made with another learning_rate; restore those values, give the model",
    ):
        train(_recipe(tmp_path, learning_rate=1e-4), tmp_path / "out", _silent)


def test_a_dataset_without_samples_is_rejected(tmp_path: Path) -> None:
    """The dataset 'labels' has conditioning only."""
    with pytest.raises(
        ConfigError, match=r"dataset 'labels' has no samples to train on; choose one that has, e\.g\. dig"
    ):
        train(_recipe(tmp_path, dataset="labels"), tmp_path, _silent)


def test_an_unknown_network_is_rejected(tmp_path: Path) -> None:
    """A misspelt architecture is a ConfigError that lists the networks."""
    with pytest.raises(ConfigError, match=r"pretraining 'tiny': unknown network 'film_mpl'; choose one of film_mlp"):
        train(_recipe(tmp_path, architecture={"net": "film_mpl"}), tmp_path, _silent)


def test_a_missing_data_file_is_rejected(tmp_path: Path) -> None:
    """The message names the option that sets the folder."""
    dataset = {"name": "cifar10", "options": {"folder": str(tmp_path)}}
    with pytest.raises(
        ConfigError, match=r"dataset 'cifar10': no file .*cifar10-train\.parquet; set the dataset's opt"
    ):
        train(_recipe(tmp_path, dataset=dataset), tmp_path, _silent)


def test_losses_are_recorded_at_every_checkpoint(tmp_path: Path) -> None:
    """The mean since the last checkpoint, and the averaged weights' losses on training and held-out samples."""
    recorded: dict[int, Any] = {}
    train(_recipe(tmp_path), tmp_path, _silent, lambda iteration, losses: recorded.update({iteration: losses}))
    assert list(recorded) == [2, 4, 6]
    assert all(set(losses) == {"loss", "train_loss", "validation_loss"} for losses in recorded.values())


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"weights_dtype": "float16"}, {"flip": True}], ids=str)
def test_settings_for_large_models_work_on_small_ones(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Autocast, weights stored at half size, and mirrored images: the model loads, in float32."""
    train(_recipe(tmp_path, iterations=2, **changes), tmp_path / "out", _silent)
    train(_recipe(tmp_path, name="plain", iterations=2), tmp_path / "out", _silent)
    model, plain = (ZooModel(str(tmp_path / f"out/{name}.safetensors")) for name in ("tiny", "plain"))
    weights, others = (m.net.inward.weight for m in (model, plain))
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, others)
    torch.testing.assert_close(weights, others, rtol=0, atol=0.02)


def test_a_speech_model_is_trained_on_strings_of_digits(tmp_path: Path) -> None:
    """The shipped recordings are the training split; card and sheet have the layout for speech."""
    architecture = {"net": "infilling", "shape": [40, 96], "tokens": 12, "width": 16, "depth": 1}
    recipe = _recipe(tmp_path, dataset="spoken_digits", architecture=architecture, iterations=3, batch_size=4)
    train(recipe, tmp_path / "out", _silent)
    model = ZooModel(str(tmp_path / "out/tiny.safetensors"))
    condition = SpokenDigits().infilling(SpokenDigits().conditions(0, range(2)))
    assert torch.isfinite(model.field(condition, 2.0)(torch.zeros(2, 40, 96), torch.tensor(0.5).double())).all()
    assert "speech-infilling model" in (tmp_path / "out/tiny.md").read_text(encoding="utf-8")
    picture = np.asarray(Image.open(write_sheet(tmp_path / "out/tiny.safetensors")))
    assert picture.shape == (STRINGS * 41 * 2, 3 * 97 * 2)


def test_the_sheet_of_a_shipped_model_shows_its_samples(tmp_path: Path) -> None:
    """One column per class, a frame around each sample, white ink on black: the picture of the model card."""
    weights = tmp_path / "digits_fm_ot.safetensors"
    weights.write_bytes((WEIGHTS / weights.name).read_bytes())
    picture = np.asarray(Image.open(write_sheet(weights)))
    assert picture.shape == (PER_CLASS * 9 * ENLARGED, 10 * 9 * ENLARGED)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, "digits_fm_ot.png"}
    corner, frame = picture[:ENLARGED, :ENLARGED], picture[8 * ENLARGED : 9 * ENLARGED]
    assert corner.max() < 64
    assert (frame == 127).all()
    assert picture.max() == 255
