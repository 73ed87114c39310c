"""The digits_cnn features: the shipped files are correct, and the distance falls with quality."""

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
    """All real digits, (1797, 1, 8, 8)."""
    return torch.from_numpy(Digits().reference().samples)


def test_the_classifier_is_as_accurate_as_its_file_says(extractor: DigitsCNN) -> None:
    """Measured on held-out digits, because features of a poor classifier would be meaningless."""
    _, held_out = split_digits()
    assert accuracy(extractor.net, held_out) == pytest.approx(extractor.facts["test_accuracy"], abs=1e-3)
    assert extractor.facts["test_accuracy"] > 0.98


def test_the_shipped_reference_is_that_of_the_real_digits(extractor: DigitsCNN, real: Tensor) -> None:
    """The shipped statistics are those of the shipped weights on the data."""
    shipped, computed = reference_moments("digits_cnn", "digits"), feature_moments(extractor, real)
    assert (shipped.features, shipped.count) == ("digits_cnn", len(real))
    np.testing.assert_allclose(shipped.mean, computed.mean, atol=1e-5)
    np.testing.assert_allclose(shipped.covariance, computed.covariance, atol=1e-5)


def test_the_shipped_files_are_small_and_packaged(repository: Path) -> None:
    """Weights and statistics are below 300 kB and are listed in the package data."""
    files = sorted(WEIGHTS.glob("digits_cnn*"))
    assert [path.name for path in files] == ["digits_cnn.digits.safetensors", "digits_cnn.safetensors"]
    assert all(path.stat().st_size < 300_000 for path in files)
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    assert "features/weights/*" in project["tool"]["setuptools"]["package-data"]["orchestrator"]


def test_the_distance_grows_with_noise(extractor: DigitsCNN, real: Tensor) -> None:
    """The distance to the real digits is nearly zero without noise."""
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    reference = reference_moments("digits_cnn", "digits")
    distances = [
        frechet_distance(feature_moments(extractor, real + level * noise), reference) for level in (0.0, 0.1, 0.3, 1.0)
    ]
    assert distances == sorted(distances)
    assert abs(distances[0]) < 1e-3 < distances[1]


def test_missing_classes_increase_the_distance(extractor: DigitsCNN, real: Tensor) -> None:
    """Perfect samples of half the classes are far from all digits: the distance measures diversity, PSNR does not."""
    labels = torch.from_numpy(Digits().reference().labels)
    reference = reference_moments("digits_cnn", "digits")
    half = frechet_distance(feature_moments(extractor, real[labels < 5]), reference)
    every_second = frechet_distance(feature_moments(extractor, real[::2]), reference)
    assert half > 20 * every_second


def test_values_out_of_range_are_clipped(extractor: DigitsCNN) -> None:
    """A viewer would clip them too."""
    ends = torch.ones(2, 1, 8, 8) * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert torch.equal(extractor(ends * 7), extractor(ends))


def test_features_have_the_stated_shape(extractor: DigitsCNN, real: Tensor) -> None:
    """(B, F) in float32, for any dtype of the samples."""
    features = extractor(real[:3].double())
    assert (features.shape, features.dtype) == ((3, extractor.dim((1, 8, 8))), torch.float32)


def test_samples_of_another_shape_are_refused(extractor: DigitsCNN) -> None:
    """The network would return features for other sizes too, but they would be meaningless."""
    with pytest.raises(
        ValueError, match=r"features 'digits_cnn' are of samples of shape \(1, 8, 8\), got \(1, 16, 16\)"
    ):
        extractor(torch.zeros(2, 1, 16, 16))


def test_training_depends_only_on_its_seed() -> None:
    """The same seed gives the same weights, and another seed gives others."""
    training, _ = split_digits()
    recipe = dataclasses.replace(RECIPES["digits_cnn"], epochs=1)
    first, again, other = (train(DigitsNet, training, recipe, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_training_learns() -> None:
    """After six epochs, most held-out digits are classified correctly."""
    training, held_out = split_digits()
    recipe = dataclasses.replace(RECIPES["digits_cnn"], epochs=6)
    assert accuracy(train(DigitsNet, training, recipe), held_out) > 0.8


def test_held_out_digits_are_not_trained_on() -> None:
    """The two sets are disjoint and together contain all digits."""
    training, held_out = split_digits()
    rows = {row.numpy().tobytes() for row in training.samples}
    assert not rows & {row.numpy().tobytes() for row in held_out.samples}
    assert len(training.labels) + len(held_out.labels) == 1797


@pytest.mark.parametrize("shift", [[0, 0], [1, -1], [-1, 0]])
def test_a_shift_moves_pixels_and_fills_in_background(shift: list[int]) -> None:
    """Right and down are positive, and uncovered pixels are -1."""
    sample = torch.full((1, 1, 8, 8), -1.0)
    sample[0, 0, 4, 4] = 1.0
    moved = shifted(sample, shift, paper=-1.0)
    assert moved[0, 0, 4 + shift[0], 4 + shift[1]] == 1
    assert moved.sum() == sample.sum()


def test_metric_names_contain_the_name_of_the_features() -> None:
    """Tables and MLflow use different forms, because MLflow names cannot have brackets."""
    assert (fid_column("digits_cnn"), fid_metric("digits_cnn")) == ("fid[digits_cnn]", "fid/digits_cnn")
