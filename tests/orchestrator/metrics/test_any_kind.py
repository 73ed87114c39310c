"""Metrics of samples that no network was trained on: Frechet, sliced Wasserstein, and the error of every coordinate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from orchestrator import plugins
from orchestrator.datasets.base import Dataset
from orchestrator.datasets.digits import Digits
from orchestrator.datasets.labels import Labels
from orchestrator.errors import ConfigError
from orchestrator.evaluation.bootstrap import compare
from orchestrator.metrics import sliced_wasserstein
from orchestrator.metrics.base import Array, Batch, Metric, SplitSummary

NO_DATA = Labels()
"""Without real samples, so that ground truth of the same pairs stands in."""
WITH_DATA = Digits()


def gaussian(count: int, size: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Array:
    """Samples of a Gaussian, (count, size)."""
    return mean + scale * np.random.default_rng(seed).standard_normal((count, size))


def metric(name: str, **options: Any) -> Metric:
    return plugins.build("metrics", name, options)


def value(built: Metric, samples: Array, real: Array) -> float:
    return built.summarise([samples[:30], samples[30:]], WITH_DATA, [real[:50], real[50:]]).mean


# ---- Frechet ------------------------------------------------------------------------------------------------------


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    """|mean difference|^2 + F (s - 1)^2 between N(0, I) and N(0.5, s^2 I)."""
    distance = value(metric("frechet"), gaussian(20_000, 4, 0), gaussian(20_000, 4, 1, mean=0.5, scale=1.5))
    assert distance == pytest.approx(4 * 0.5**2 + 4 * 0.5**2, rel=0.05)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_frechet_takes_data_of_any_range_and_has_its_unit_squared(scale: float) -> None:
    """Values far beyond those of a network's features, or far below their rounding, lose no accuracy."""
    samples, real = gaussian(300, 5, 0), gaussian(300, 5, 1, mean=1)
    expected = value(metric("frechet"), samples, real)
    assert value(metric("frechet"), samples * scale, real * scale) == pytest.approx(expected * scale**2, rel=1e-5)


def test_frechet_has_the_bias_that_its_docstring_states() -> None:
    """v F (F + 5) / 4 (1 / N + 1 / M), between samples of one distribution of variance v."""
    size, count, variance = 16, 1000, 4.0
    distances = [
        value(
            metric("frechet"),
            gaussian(count, size, 2 * i, scale=variance**0.5),
            gaussian(2 * count, size, 2 * i + 1, scale=variance**0.5),
        )
        for i in range(10)
    ]
    assert np.mean(distances) == pytest.approx(variance * size * (size + 5) / 4 * (1 / count + 0.5 / count), rel=0.1)


def test_a_single_coordinate_has_a_frechet_distance() -> None:
    """The covariance of samples of shape (1,) is a number."""
    distance = value(metric("frechet"), gaussian(5000, 1, 0), gaussian(5000, 1, 1, scale=2))
    assert distance == pytest.approx(1, rel=0.1)


def test_more_dimensions_than_samples_are_refused() -> None:
    """The message has both numbers and the metric that is defined all the same."""
    message = (
        r"frechet\[raw\] fits a covariance to 64 features per sample, which 64 samples do not determine; use at least "
        r"65 samples, preferably 640, or the metric sliced_wasserstein"
    )
    with pytest.raises(ValueError, match=message):
        metric("frechet").check_samples((8, 8), 64)
    metric("frechet").check_samples((8, 8), 65)


# ---- sliced Wasserstein -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "others"), [(40, 40), (40, 60), (31, 90)])
def test_projections_are_compared_exactly(count: int, others: int) -> None:
    """In one dimension the coupling gives scipy's distance of order 1 for every pair of sizes, and order 2 by hand."""
    mine, theirs = gaussian(count, 1, 0)[:, 0], gaussian(others, 1, 1, mean=0.3)[:, 0]
    first, second, widths = sliced_wasserstein._coupling(count, others)
    moved = np.sort(mine)[first] - np.sort(theirs)[second]
    assert widths @ abs(moved) == pytest.approx(wasserstein_distance(mine, theirs), rel=1e-12)
    repeated = np.sort(mine.repeat(others)) - np.sort(theirs.repeat(count))
    expected = math.sqrt(np.mean(repeated**2))
    assert value(metric("sliced_wasserstein"), mine[:, None], theirs[:, None]) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension() -> None:
    """A direction sees the cosine of its angle with the shift; the mean of its square is 1 / F."""
    samples = gaussian(200, 6, 0)
    shifted = samples + np.array([3.0, 0, 0, 0, 0, 0])
    distance = value(metric("sliced_wasserstein", projections=4000), samples, shifted)
    assert distance == pytest.approx(3 / math.sqrt(6), rel=0.03)


def test_sliced_wasserstein_sees_a_shape_that_frechet_does_not() -> None:
    """Two points have the mean and the variance of a Gaussian."""
    signs = np.sign(gaussian(4000, 1, 0))
    real = gaussian(4000, 1, 1)
    assert value(metric("frechet"), signs, real) < 0.01
    assert value(metric("sliced_wasserstein"), signs, real) > 0.5


def test_the_standard_error_is_that_of_drawing_samples() -> None:
    """It is the spread of values over independent draws, to a quarter."""
    built = metric("sliced_wasserstein", projections=32)
    summaries = [
        built.summarise([gaussian(300, 3, 2 * i, mean=0.5)], WITH_DATA, [gaussian(300, 3, 2 * i + 1)])
        for i in range(60)
    ]
    spread = float(np.std([summary.mean for summary in summaries], ddof=1))
    assert np.mean([summary.stderr for summary in summaries]) == pytest.approx(spread, rel=0.25)


def test_samples_equal_to_ground_truth_have_no_distance_and_no_error() -> None:
    """Ground truth of the same pairs is resampled with them."""
    samples = gaussian(100, 3, 0)
    summary = metric("sliced_wasserstein").summarise([samples], NO_DATA, [samples])
    assert (summary.mean, summary.stderr, summary.count) == (0, 0, 100)


def test_sliced_wasserstein_depends_on_its_seed_and_on_nothing_else() -> None:
    """The same directions in every call, whatever the shards."""
    samples, real = gaussian(100, 3, 0), gaussian(80, 3, 1)
    built = metric("sliced_wasserstein", projections=8)
    whole = built.summarise([samples], WITH_DATA, [real])
    assert value(built, samples, real) == pytest.approx(whole.mean, rel=1e-12)
    assert value(metric("sliced_wasserstein", projections=8, seed=1), samples, real) != whole.mean


# ---- what both compare with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["frechet", "sliced_wasserstein"])
@pytest.mark.parametrize(
    ("dataset", "options", "with_truth", "compared"),
    [
        (Labels(), {}, True, "ground truth of the same pairs"),
        (Digits(), {}, False, "1,797 real samples of Digits"),
        (Digits(), {"reference": "ground_truth"}, True, "ground truth of the same pairs"),
        (Labels(), {"reference": {"name": "digits"}}, False, "1,797 real samples of Digits"),
        (
            Labels(),
            {"reference": "digits", "features": "digits_cnn"},
            False,
            "the statistics 'digits'",
        ),
    ],
)
def test_ground_truth_stands_in_for_a_dataset_without_real_samples(
    name: str, dataset: Dataset, options: dict[str, Any], with_truth: bool, compared: str
) -> None:
    """Real samples are used where there are any, and the tables say which."""
    built = metric(name, **options)
    built.check(dataset)
    assert built.compares_with_truth(dataset) == with_truth
    assert built.compared_with(dataset) == compared
    assert (built.real(dataset) is not None) == ("real samples" in compared)


def test_statistics_of_other_features_are_refused() -> None:
    """The shipped statistics are of 64 features of a network, not of raw samples."""
    with pytest.raises(ConfigError, match=r"no reference statistics raw\.digits; there are: "):
        metric("frechet", reference="digits").check(Labels())


# ---- error by coordinate ------------------------------------------------------------------------------------------


def errors(shape: tuple[int, ...], count: int = 500) -> Batch:
    """Samples off ground truth by noise whose scale is 1, 2, 3, ... along the last axis."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(count, *shape, generator=generator)
    scales = torch.arange(1.0, shape[-1] + 1)
    return Batch(reference + scales * torch.randn(count, *shape, generator=generator), None, None, reference)


def split(built: Metric, batch: Batch) -> SplitSummary:
    measured = built.measure(batch).numpy()
    summary = built.summarise([measured[:7], measured[7:]], NO_DATA)
    assert isinstance(summary, SplitSummary)
    return summary


@pytest.mark.parametrize(
    ("shape", "options", "names", "expected"),
    [
        ((3,), {}, ["0", "1", "2"], [1, 2, 3]),
        ((20, 3), {"axis": 1}, ["0", "1", "2"], [1, 2, 3]),
        ((2, 2), {}, ["0", "1", "2", "3"], [1, 2, 1, 2]),
        ((4, 5, 3), {"axis": 2}, ["0", "1", "2"], [1, 2, 3]),
        ((20, 3), {"axis": 1, "groups": {"arm": [0, 1], "gripper": [2]}}, ["arm", "gripper"], [2.5**0.5, 3]),
    ],
)
def test_every_coordinate_has_its_own_error(
    shape: tuple[int, ...], options: dict[str, Any], names: list[str], expected: list[float]
) -> None:
    """The value is the largest, with the mean over coordinates beside it."""
    summary = split(metric("coordinate_rmse", **options), errors(shape))
    assert [name for name, _, _ in summary.parts] == names
    np.testing.assert_allclose([rmse for _, rmse, _ in summary.parts], expected, rtol=0.12)
    assert summary.mean == max(rmse for _, rmse, _ in summary.parts)
    assert summary.over_parts == pytest.approx(np.mean([rmse for _, rmse, _ in summary.parts]))


def test_errors_of_an_rmse_are_those_of_drawing_samples() -> None:
    """For Gaussian errors of scale s it is s / sqrt(2 N)."""
    summary = split(metric("coordinate_rmse"), errors((3,), count=5000))
    np.testing.assert_allclose([error for _, _, error in summary.parts], np.arange(1, 4) / 100, rtol=0.1)


def test_the_largest_errors_of_two_solvers_are_compared_pair_by_pair() -> None:
    """A solver with half the errors is better in every resample."""
    built, batch = metric("coordinate_rmse"), errors((3,), count=100)
    values = built.measure(batch).numpy()
    (result,) = compare(built, {"coarse": values, "fine": values / 4})
    assert (result.better, result.chance) == ("fine", 0)
    assert result.difference == pytest.approx(-split(built, batch).mean / 2)


def test_samples_that_are_not_finite_are_left_out_of_every_coordinate() -> None:
    """One of 500, counted; of none but such samples there is no value."""
    built, batch = metric("coordinate_rmse"), errors((3,))
    batch.samples[3, 1] = math.nan
    summary = split(built, batch)
    assert (summary.count, summary.not_finite) == (499, 1)
    assert all(math.isfinite(rmse) for _, rmse, _ in summary.parts)
    nothing = built.summarise([np.full((2, 3), math.nan)], NO_DATA)
    assert (nothing.count, nothing.not_finite) == (0, 2)
    assert math.isnan(nothing.mean)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"axis": 1}, (7,), r"samples of shape \(7,\) have no axis 1"),
        ({"groups": {"a": [0, 7]}}, (7,), r"group 'a' has index 7, but there are 7 coordinates, from 0"),
        ({"axis": 0, "groups": {"a": [2]}}, (2, 9), r"group 'a' has index 2, but there are 2 coordinates"),
        ({"axis": -1}, (7,), "axis must be at least 0"),
        ({"groups": {}}, (7,), "groups is empty"),
        ({"groups": {"a": []}}, (7,), r"group 'a' must list indices from 0"),
        ({"groups": {"a": 3}}, (7,), r"group 'a' must list indices from 0, e.g. \[0, 1\], got 3"),
    ],
)
def test_coordinates_that_do_not_exist_are_refused(
    options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    """When the metric is built, or when the shape is known."""
    with pytest.raises((ValueError, ConfigError), match=message):
        metric("coordinate_rmse", **options).check_samples(shape, 10)
