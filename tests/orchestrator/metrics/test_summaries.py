"""Known values of each metric, and means that do not depend on the order of the samples."""

from __future__ import annotations

import math
import random

import pytest
import torch

from orchestrator.metrics.base import Summary, summarise
from orchestrator.metrics.psnr import PSNR
from orchestrator.metrics.rmse import RMSE
from orchestrator.metrics.snr import SNR


@pytest.mark.parametrize(("error", "data_range", "psnr"), [(0.2, 2.0, 20.0), (0.02, 2.0, 40.0), (0.1, 1.0, 20.0)])
def test_psnr_of_a_constant_error_is_the_range_over_the_error(error: float, data_range: float, psnr: float) -> None:
    """10 log10(range^2 / MSE): an error of a tenth of the range is 20 dB."""
    reference = torch.zeros(3, 1, 4, 4)
    values = PSNR().per_sample(reference + error, reference, data_range)
    torch.testing.assert_close(values, torch.full((3,), psnr, dtype=torch.float64), rtol=0, atol=1e-5)


def test_psnr_is_averaged_over_samples_not_over_their_errors() -> None:
    """40 dB and 20 dB average to 30 dB; the PSNR of the mean error would be 22.97."""
    reference = torch.zeros(2, 1, 1, 2)
    samples = reference + torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)
    assert summarise(PSNR().per_sample(samples, reference, 2.0).tolist()).mean == pytest.approx(30, abs=1e-5)


def test_psnr_does_not_clip_samples() -> None:
    """A value outside the range of the data is an error like any other."""
    reference = torch.ones(1, 1, 1, 1)
    assert PSNR().per_sample(reference + 0.2, reference, 2.0).item() == pytest.approx(20, abs=1e-5)


def test_an_exact_sample_has_infinite_psnr_and_snr() -> None:
    """The value is not capped."""
    exact = torch.ones(1, 2)
    assert PSNR().per_sample(exact, exact, 2.0).item() == math.inf
    assert SNR().per_sample(exact, exact, 2.0).item() == math.inf
    assert RMSE().per_sample(exact, exact, 2.0).item() == 0


def test_snr_is_relative_to_the_energy_of_the_sample() -> None:
    """An error of a tenth of the signal is 20 dB for any signal level."""
    reference = torch.tensor([[1.0, -1.0], [100.0, 100.0]])
    torch.testing.assert_close(
        SNR().per_sample(1.1 * reference, reference, 2.0),
        torch.tensor([20.0, 20.0], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )


def test_rmse_is_the_root_of_the_mean_over_dimensions() -> None:
    """It is the papers' norm: errors 3 and 4 give 3.54, not 5."""
    assert RMSE().per_sample(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 2.0).item() == pytest.approx(
        math.sqrt(12.5)
    )


def test_a_summary_has_mean_standard_error_and_count() -> None:
    """1, 2, 3, 4: mean 2.5, standard error 0.6455."""
    assert summarise([1.0, 2.0, 3.0, 4.0]) == Summary(2.5, math.sqrt(5 / 3 / 4), 4, 0)
    assert summarise([7.0]) == Summary(7.0, 0.0, 1, 0)


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    """They neither disappear silently nor make the mean infinite or NaN."""
    summary = summarise([1.0, math.inf, 3.0, math.nan, -math.inf])
    assert (summary.mean, summary.count, summary.not_finite) == (2.0, 2, 3)
    empty = summarise([math.nan])
    assert math.isnan(empty.mean)
    assert (empty.count, empty.not_finite) == (0, 1)


def test_a_mean_does_not_depend_on_the_order_to_the_last_bit() -> None:
    """Hosts answer in any order, so sums are exact."""
    rng = random.Random(0)
    values = [rng.gauss(0, 1) * 10 ** rng.randint(-12, 12) for _ in range(1000)]
    results = set()
    for _ in range(10):
        rng.shuffle(values)
        summary = summarise(values)
        results.add((summary.mean, summary.stderr))
    assert len(results) == 1
