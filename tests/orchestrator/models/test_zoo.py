"""The zoo: the models that ship with the package, and how they are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.mel import vocode
from orchestrator.audio.recognisers.base import word_error_rate
from orchestrator.audio.recognisers.digits import understood
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.errors import ConfigError
from orchestrator.features.cifar10_gray16_cnn import Cifar10Gray16CNN
from orchestrator.features.digits_cnn import DigitsCNN
from orchestrator.models.base import ModelAdapter, expand_time
from orchestrator.models.zoo import ZooModel
from orchestrator.models.zoo.adapter import WEIGHTS, zoo_names
from orchestrator.models.zoo.nets import build_net
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise

MEGABYTE = 1_000_000


def _condition(model: ZooModel, count: int) -> Tensor:
    """Labels in turn, or strings of digits to be spoken."""
    if model.net.conditioning == "spoken_digits":
        dataset = SpokenDigits()
        return dataset.infilling(dataset.conditions(0, range(count)))
    return torch.arange(count) % model.net.classes


def _samples(model: ZooModel, condition: Tensor, guidance_scale: float) -> Tensor:
    """Ground-truth samples."""
    x0 = torch.from_numpy(noise(0, range(len(condition)), model.shape))
    return solve(model.field(condition, guidance_scale), x0, 1e-4, 1e-4).x1


@pytest.mark.parametrize("name", zoo_names())
def test_a_shipped_model_loads_is_small_and_has_a_card(name: str) -> None:
    """Under 12 MB, with a card that states data, recipe, seed, loss and commit; the digest is the file's sha256."""
    model = ZooModel(name)
    path = WEIGHTS / f"{name}.safetensors"
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.stat().st_size < 12 * MEGABYTE
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{model.parameters:,} parameters" in card
    assert all(f"| {fact} |" in card for fact in ("data", "network", "recipe", "seed", "trained with"))
    assert "held out" in card
    assert f"| {model.prediction} |" in card


@pytest.mark.parametrize("name", [name for name in zoo_names() if name.startswith("digits")])
def test_a_shipped_model_predicts_much_better_than_the_mean(name: str) -> None:
    """From a half-noised digit, its velocity explains more than 70 % of the variance of the true one."""
    model = ZooModel(name)
    reference = plugins.build("datasets", "digits").reference()
    x1 = torch.from_numpy(reference.samples[:500])
    noise = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0))
    scheduler = model.scheduler
    t = torch.tensor(0.5, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (float(value) for value in scheduler(t))
    velocity = model.field(torch.from_numpy(reference.labels[:500]), 1.0)(alpha * x1 + sigma * noise, t)
    target = d_alpha * x1 + d_sigma * noise
    explained = 1 - (velocity - target).square().mean() / target.var()
    assert explained > 0.7


def test_the_zoo_covers_the_three_parametrisations() -> None:
    """FM-OT, FM/v-CS and epsilon-VP: each branch of the mathematics has a model."""
    parametrisations = {(model.prediction, model.native.name) for model in map(ZooModel, zoo_names())}
    assert parametrisations >= {("velocity", "cond_ot"), ("v_prediction", "cosine"), ("epsilon", "vp")}


def test_an_unknown_model_is_rejected_with_a_suggestion() -> None:
    """The message suggests the closest name and lists all models."""
    with pytest.raises(
        ConfigError,
        match=r"no zoo model 'digit_fm_ot' \(did you mean 'digits_fm_ot'\?\); there are: .*, or give the path of a",
    ):
        ZooModel("digit_fm_ot")


@pytest.mark.parametrize("options", [{}, {"weights": 3}, {"weights": "digits_fm_ot", "width": 8}, {"weight": "x"}])
def test_invalid_options_are_rejected_before_anything_is_loaded(options: dict[str, object]) -> None:
    """The adapter takes one option, a name or a path."""
    with pytest.raises(ConfigError, match=r"model adapter 'zoo' takes one option, 'weights', a name or a path; got \{"):
        ZooModel.check(options)


def test_a_file_that_is_not_a_zoo_model_is_rejected(tmp_path: Path) -> None:
    """Not safetensors, safetensors with other content, or a missing file."""
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"PK not weights")
    with pytest.raises(
        ConfigError, match=r"nothing\.safetensors is not a zoo model: .*; make one with `bespoke pretrain`"
    ):
        ZooModel(str(nothing))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, str(other))
    with pytest.raises(ConfigError, match=r"other\.safetensors is not a zoo model: 'bespoke_zoo'; make one with"):
        ZooModel(str(other))
    with pytest.raises(ConfigError, match=r"no zoo model '.*missing\.safetensors'"):
        ZooModel(str(tmp_path / "missing.safetensors"))


def test_a_model_is_loaded_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own model. The same bytes have the same digest under any file name."""
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes((WEIGHTS / "digits_fm_ot.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    model = ZooModel("mine.safetensors")
    assert model.name == "mine"
    assert model.digest == ZooModel("digits_fm_ot").digest


def test_a_network_computes_in_float32_and_returns_the_dtype_of_the_state() -> None:
    """Ground truth keeps a float64 state around a float32 network."""
    model: ModelAdapter = ZooModel("digits_fm_ot")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, label = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1, 2])
    single, double = model.predict(x, t, label), model.predict(x.double(), t, label)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"net": "resnet"}, "unknown network 'resnet'; choose one of film_mlp"),
        ({}, "unknown network None; choose one of film_mlp"),
        ({"net": "film_mlp", "widht": 8}, "network 'film_mlp' does not take these arguments"),
    ],
)
def test_an_invalid_architecture_is_rejected(architecture: dict[str, object], message: str) -> None:
    """The message lists the networks that exist, or says which arguments do not fit."""
    with pytest.raises(ValueError, match=message):
        build_net(architecture)


@pytest.mark.parametrize("label", [10, 11, -1])
def test_a_label_outside_the_trained_classes_is_rejected(label: int) -> None:
    """Label 10 of ten classes means "dropped": as conditioning it would silently be unconditional."""
    with pytest.raises(ConfigError, match=rf"model 'digits_fm_ot': label {label} is not one of its 10 classes; set"):
        ZooModel("digits_fm_ot").check_condition(torch.tensor([0, 9, label]))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", zoo_names())
def test_batched_times_give_exactly_the_velocities_of_separate_times(name: str, guidance_scale: float) -> None:
    """Bit-identical to calls with a single time, so requests of several solvers may share a batch."""
    model = ZooModel(name)
    field = model.field(_condition(model, 6), guidance_scale)
    x = torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(field.scheduler.t_min, field.scheduler.t_max, 6, dtype=torch.float64)
    separate = torch.stack([field(x, t)[i] for i, t in enumerate(times)])
    assert torch.equal(field(x, times), separate)


def test_a_wrong_number_of_times_is_rejected() -> None:
    """Times are a scalar or one per sample; any other number is a bug in a solver."""
    with pytest.raises(ValueError, match=r"times of shape \(3,\) for a batch of 2 samples; give one time"):
        expand_time(torch.zeros(3, dtype=torch.float64), torch.zeros(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guidance_scale", "share"),
    [
        ("digits_fm_ot", 1.0, 0.95),
        ("digits_fm_v_cs", 1.0, 0.95),
        ("digits_eps_vp", 1.0, 0.95),
        ("cifar10_gray16_fm_ot", 2.0, 0.7),
    ],
)
def test_samples_match_their_labels(name: str, guidance_scale: float, share: float) -> None:
    """A classifier trained on real data, independent of the model, recognises the requested class."""
    model = ZooModel(name)
    classifier = DigitsCNN() if name.startswith("digits") else Cifar10Gray16CNN()
    labels = _condition(model, 300)
    predicted = classifier.classify(_samples(model, labels, guidance_scale))
    assert (predicted == labels).float().mean() >= share


@pytest.mark.slow
def test_speech_samples_are_intelligible() -> None:
    """The word error rate of vocoded ground truth is at most 10 points above that of vocoded recordings."""
    model, dataset = ZooModel("spoken_digits_fm_ot"), SpokenDigits()
    plans = dataset.conditions(1, range(60))
    said = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    samples = _samples(model, dataset.infilling(plans), 1.0)
    rates = [
        word_error_rate(said, understood([vocode(string) for string in strings.numpy()]))
        for strings in (samples, dataset.real(plans))
    ]
    assert rates[0] <= rates[1] + 0.1


@pytest.mark.parametrize(
    ("name", "conditioning", "message"),
    [
        (
            "spoken_digits_fm_ot",
            "labels",
            r"is conditioned on strings to be spoken, which Labels does not provide; set",
        ),
        ("digits_fm_ot", "spoken_digits", r"is conditioned on class labels, which SpokenDigits does not provide;"),
        ("digits_fm_ot", {"classes": 12}, r"draws from 12 classes, but model 'digits_fm_ot' has 10; set condit"),
    ],
)
def test_conditioning_that_does_not_fit_the_model_is_rejected(name: str, conditioning: object, message: str) -> None:
    """The check needs only the configuration."""
    options = conditioning if isinstance(conditioning, dict) else {}
    dataset = plugins.build("datasets", "labels" if options else str(conditioning), options)
    with pytest.raises(ConfigError, match=message):
        ZooModel.check_conditioning({"weights": name}, dataset)
