"""Losses and PSNR: known values, the order of log and mean, and shapes."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import noise

from solvers.losses import counted, per_sample_mse, psnr_db, psnr_loss


def test_the_norm_is_a_mean_over_the_dimensions_of_a_sample() -> None:
    """||x||^2 is the mean over dimensions: an error of 0.5 everywhere gives 0.25 for any sample shape."""
    x = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(per_sample_mse(x, x + 0.5), torch.full((2,), 0.25))


def test_the_loss_averages_logs_instead_of_taking_the_log_of_the_mean() -> None:
    """BNS eq. 13: errors of 1 and 1e-4 average to log 1e-2, while the log of their mean would be log 0.5."""
    reference = torch.zeros(2, 5, dtype=torch.float64)
    x = torch.stack([torch.full((5,), 1.0), torch.full((5,), 1e-2)]).double()
    assert float(psnr_loss(x, reference).mean()) == pytest.approx(math.log(1e-2))
    assert float(psnr_loss(x, reference).mean()) < math.log(float(per_sample_mse(x, reference).mean())) - 3


def test_minimising_the_loss_maximises_psnr() -> None:
    """The printed sign of eq. 13 is wrong: PSNR is the loss times -10/ln 10 plus a constant."""
    reference, x = noise(4, 6), noise(4, 6, seed=1)
    expected = 20 * math.log10(2) - 10 / math.log(10) * psnr_loss(x, reference)
    torch.testing.assert_close(psnr_db(per_sample_mse(x, reference), data_range=2.0), expected)


def test_psnr_of_known_errors() -> None:
    """10 log10(range^2 / MSE): 20 dB for 0.01 on range 1, 6.02 dB more on range 2, +inf for an exact sample."""
    mse = torch.tensor([0.01, 1.0, 0.0], dtype=torch.float64)
    assert psnr_db(mse, 1.0).tolist() == pytest.approx([20.0, 0.0, math.inf])
    assert psnr_db(mse, 2.0).tolist() == pytest.approx([26.0206, 6.0206, math.inf])


def test_an_exact_sample_has_a_finite_loss_and_gradient() -> None:
    """One exact sample must not turn the gradient of its batch into NaN."""
    x = torch.zeros(2, 3, requires_grad=True)
    psnr_loss(x, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert x.grad[1].abs().sum() > 0


def test_half_precision_samples_are_compared_in_single_precision() -> None:
    """The square of an error of 1e-4 underflows in float16, but must count in the loss."""
    reference = torch.zeros(1, 4, dtype=torch.float16)
    x = torch.full((1, 4), 1e-4, dtype=torch.float16)
    assert float(psnr_loss(x, reference)) == pytest.approx(math.log(1e-8), abs=1e-2)


def test_samples_whose_shape_differs_from_the_reference_are_rejected() -> None:
    """Broadcasting would compare every sample with the same reference."""
    with pytest.raises(ValueError, match=r"samples of shape \(4, 3\) do not match the reference of shape \(1, 3\)"):
        psnr_loss(torch.zeros(4, 3), torch.zeros(1, 3))


def test_a_mask_leaves_entries_out_of_every_mean() -> None:
    """The MSE of two masked tensors is that of the entries that count, whatever the others are; so is the gradient."""
    x, reference = noise(3, 4, 2).requires_grad_(True), noise(3, 4, 2, seed=1)
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)[..., None]
    broken = torch.where(mask, reference, torch.inf)
    mse = per_sample_mse(counted(x, mask), counted(broken, mask))
    full = mask.expand_as(x)
    for row in range(3):
        expected = (x - reference)[row][full[row]].square().mean()
        torch.testing.assert_close(mse[row], expected)
    (gradient,) = torch.autograd.grad(mse.sum(), x)
    assert bool((gradient[~full] == 0).all())
    assert bool(torch.isfinite(gradient).all())
    assert counted(x, None) is x
