"""The features of digits: what the shipped files claim is true, and the distance falls with quality."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.datasets.digits import Digits
from orchestrator.features.base import fid_column, fid_metric
from orchestrator.features.digits_cnn import DigitsCNN, DigitsNet
from orchestrator.features.moments import WEIGHTS, feature_moments, frechet_distance, reference_moments
from orchestrator.training.classifier import RECIPES, accuracy, shifted, split_digits, train


@pytest.fixture(scope="module")
def extractor() -> DigitsCNN:
    return DigitsCNN()


@pytest.fixture(scope="module")
def real() -> Tensor:
    """All real digits."""
    return torch.from_numpy(Digits().reference().samples)


def test_the_classifier_is_as_accurate_as_its_file_says(extractor: DigitsCNN) -> None:
    """On digits it was not trained on; features of a poor classifier would measure little."""
    _, held_out = split_digits()
    assert accuracy(extractor.net, held_out) == pytest.approx(extractor.facts["test_accuracy"], abs=1e-3)
    assert extractor.facts["test_accuracy"] > 0.98


def test_the_reference_is_that_of_the_real_digits(extractor: DigitsCNN, real: Tensor) -> None:
    """What travels with the package is what the shipped weights say of the data."""
    shipped, found = reference_moments("digits_cnn", "digits"), feature_moments(extractor, real)
    assert (shipped.features, shipped.count) == ("digits_cnn", len(real))
    np.testing.assert_allclose(shipped.mean, found.mean, atol=1e-5)
    np.testing.assert_allclose(shipped.covariance, found.covariance, atol=1e-5)


def test_the_shipped_files_are_small_and_packaged(repository: Path) -> None:
    """Weights and statistics below 300 kB, named in the package data."""
    files = sorted(WEIGHTS.glob("digits_cnn*"))
    assert [path.name for path in files] == ["digits_cnn.digits.safetensors", "digits_cnn.safetensors"]
    assert all(path.stat().st_size < 300_000 for path in files)
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    assert "features/weights/*" in project["tool"]["setuptools"]["package-data"]["orchestrator"]


def test_the_distance_grows_with_damage(extractor: DigitsCNN, real: Tensor) -> None:
    """More noise, further from the real digits; none, next to nothing."""
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    reference = reference_moments("digits_cnn", "digits")
    distances = [
        frechet_distance(feature_moments(extractor, real + level * noise), reference) for level in (0.0, 0.1, 0.3, 1.0)
    ]
    assert distances == sorted(distances)
    assert abs(distances[0]) < 1e-3 < distances[1]


def test_missing_classes_are_noticed(extractor: DigitsCNN, real: Tensor) -> None:
    """Perfect samples of half the classes are far from all digits: a distance sees diversity, PSNR does not."""
    labels = torch.from_numpy(Digits().reference().labels)
    reference = reference_moments("digits_cnn", "digits")
    half = frechet_distance(feature_moments(extractor, real[labels < 5]), reference)
    every_second = frechet_distance(feature_moments(extractor, real[::2]), reference)
    assert half > 20 * every_second


def test_what_is_out_of_range_counts_as_its_end(extractor: DigitsCNN) -> None:
    """As a viewer would show it."""
    ends = torch.ones(2, 1, 8, 8) * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert torch.equal(extractor(ends * 7), extractor(ends))


def test_features_have_the_stated_shape(extractor: DigitsCNN, real: Tensor) -> None:
    """(B, F), float32, whatever the samples' dtype."""
    found = extractor(real[:3].double())
    assert (found.shape, found.dtype) == ((3, extractor.dim), torch.float32)


def test_samples_of_another_shape_are_refused(extractor: DigitsCNN) -> None:
    """A network of 8x8 digits would say something about any crop."""
    with pytest.raises(ValueError, match=r"digits_cnn takes samples of shape \(B, 1, 8, 8\), got \(2, 1, 16, 16\)"):
        extractor(torch.zeros(2, 1, 16, 16))


def test_training_is_a_function_of_its_seed() -> None:
    """The same weights again, and another seed's are others."""
    training, _ = split_digits()
    recipe = dataclasses.replace(RECIPES["digits_cnn"], epochs=1)
    first, again, other = (train(DigitsNet, training, recipe, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_training_learns() -> None:
    """A few passes already tell most digits apart, on those held out."""
    training, held_out = split_digits()
    recipe = dataclasses.replace(RECIPES["digits_cnn"], epochs=6)
    assert accuracy(train(DigitsNet, training, recipe), held_out) > 0.8


def test_held_out_digits_are_not_trained_on() -> None:
    """The two sets are disjoint, and together all digits."""
    training, held_out = split_digits()
    rows = {row.numpy().tobytes() for row in training.samples}
    assert not rows & {row.numpy().tobytes() for row in held_out.samples}
    assert len(training.labels) + len(held_out.labels) == 1797


@pytest.mark.parametrize("shift", [[0, 0], [1, -1], [-1, 0]])
def test_a_shift_moves_pixels_and_brings_in_blank_paper(shift: list[int]) -> None:
    """Right and down are positive; what comes in is -1."""
    sample = torch.full((1, 1, 8, 8), -1.0)
    sample[0, 0, 4, 4] = 1.0
    moved = shifted(sample, shift, paper=-1.0)
    assert moved[0, 0, 4 + shift[0], 4 + shift[1]] == 1
    assert moved.sum() == sample.sum()


def test_the_name_of_the_features_is_part_of_the_number() -> None:
    """In tables, and in MLflow, whose names know no brackets."""
    assert (fid_column("digits_cnn"), fid_metric("digits_cnn")) == ("fid[digits_cnn]", "fid/digits_cnn")
