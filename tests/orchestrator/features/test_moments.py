"""Feature statistics: exact for any split into batches, equal to numpy's, and the Fréchet distance between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.features import moments
from orchestrator.features.moments import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    reference_moments,
)

DIM = 6


@pytest.fixture
def features() -> Tensor:
    """Correlated features with means far from 0, for which a covariance from sums loses most precision."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator)
    return torch.randn(500, DIM, generator=generator) @ mixing + torch.arange(DIM) * 3.0


def _moments(*parts: Tensor) -> Moments:
    statistics = FeatureStatistics("test", DIM)
    for part in parts:
        statistics.add(part)
    return statistics.moments()


def _same(a: Moments, b: Moments) -> bool:
    return (a.count, a.mean.tobytes(), a.covariance.tobytes()) == (b.count, b.mean.tobytes(), b.covariance.tobytes())


@pytest.mark.parametrize("size", [1, 7, 64, 499])
def test_batches_of_any_size_give_the_same_bits(features: Tensor, size: int) -> None:
    """Additions are exact, so a distance does not depend on the batch size."""
    assert _same(_moments(*features.split(size)), _moments(features))


def test_samples_in_any_order_give_the_same_bits(features: Tensor) -> None:
    """A distance does not depend on which scorer finishes first."""
    assert _same(_moments(features.flip(0)), _moments(features))


def test_moments_agree_with_numpy(features: Tensor) -> None:
    """The mean, and the covariance normalised by N - 1, as in torch-fidelity."""
    computed, values = _moments(features), features.double().numpy()
    np.testing.assert_allclose(computed.mean, values.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(computed.covariance, np.cov(values, rowvar=False), rtol=1e-6, atol=1e-6)


def _gaussian(mean: list[float], variance: list[float], name: str = "test") -> Moments:
    return Moments(name, 100, np.array(mean), np.diag(variance))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (([0.0, 0.0], [1.0, 2.0]), ([0.0, 0.0], [1.0, 2.0]), 0.0),
        (([0.0, 0.0], [1.0, 2.0]), ([3.0, 4.0], [1.0, 2.0]), 25.0),
        (([0.0, 0.0], [1.0, 4.0]), ([0.0, 0.0], [9.0, 16.0]), 8.0),
    ],
    ids=["same", "moved", "wider"],
)
def test_the_distance_of_known_gaussians(
    a: tuple[list[float], list[float]], b: tuple[list[float], list[float]], distance: float
) -> None:
    """|difference of means|^2 plus, for diagonal covariances, the squared differences of standard deviations."""
    assert frechet_distance(_gaussian(*a), _gaussian(*b)) == pytest.approx(distance, abs=1e-9)


def test_a_distance_between_different_features_is_refused() -> None:
    """Their sizes may match, but their meanings do not."""
    with pytest.raises(ValueError, match="between features 'test' and 'other' means nothing"):
        frechet_distance(_gaussian([0.0], [1.0]), _gaussian([0.0], [1.0], "other"))


def test_moments_survive_a_file(features: Tensor) -> None:
    """Statistics read from a file are the computed ones, bit for bit."""
    computed = _moments(features)
    assert _same(Moments.from_bytes(computed.to_bytes(dataset="digits")), computed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f[:, 1:], r"features of test are \(B, 6\), got \(500, 5\)"),
        (lambda f: f.index_fill(0, torch.tensor([3, 8]), torch.nan), "features of 2 of 500 samples are not finite"),
        (lambda f: f * 100, r"above 64: sums would not be exact; scale the extractor's features down"),
        (lambda f: f[:6], "6 samples do not determine the covariance of 6 features; use at least 7"),
    ],
    ids=["width", "nan", "size", "few"],
)
def test_features_that_would_give_a_wrong_distance_are_refused(
    features: Tensor, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    """The message has the value and what to do."""
    with pytest.raises(ValueError, match=message):
        _moments(spoil(features))


def test_more_samples_than_exact_sums_allow_are_refused(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2^23 samples, additions would start to round."""
    monkeypatch.setattr(moments, "MAX_COUNT", 600)
    with pytest.raises(ValueError, match="statistics of more than 600 samples would not be exact"):
        _moments(features, features)


def test_sums_of_the_largest_features_are_exact() -> None:
    """Features just below the limit are compared with integers of arbitrary precision."""
    values = torch.full((300, 1), 64.0).double() - torch.arange(1, 301).double()[:, None] * 2.0**-24
    statistics = FeatureStatistics("test", 1)
    for part in values.split(37):
        statistics.add(part)
    integers = [int(value * 2**24) for value in values[:, 0].tolist()]
    assert int(statistics._sums.sum() * 2**24) == sum(integers)
    high, mixed, low = (int(product * 2**48) for product in statistics._products[:, 0, 0])
    assert high + 2 * mixed + low == sum(value * value for value in integers)


def test_missing_reference_statistics_are_refused() -> None:
    """The message lists the existing ones."""
    with pytest.raises(ConfigError, match=r"no reference statistics digits_cnn\.labels; there are: .*digits_cnn\.d"):
        reference_moments("digits_cnn", "labels")
