"""Losses of solver distillation, in the norm of the papers: ||x||^2 is the mean over a sample's dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MSE_FLOOR = 1e-28
"""Floor of the MSE, which keeps a loss's gradient finite for an exact sample; 280 dB below unit range."""


def per_sample_mse(x: Tensor, reference: Tensor) -> Tensor:
    """||x - reference||^2 per sample, shape (B,), in float32 or better.

    Raises:
        ValueError: The shapes differ.
    """
    if x.shape != reference.shape:
        raise ValueError(
            f"samples of shape {tuple(x.shape)} do not match the reference of shape {tuple(reference.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) - reference.to(dtype)).square().flatten(1).mean(dim=1)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` restricted to the entries that count, so that means over all entries are means over those alone.

    The others become 0, even if they are infinite, and each sample is scaled by the root of the inverse share of its
    entries that count. Of two tensors treated alike, the MSE is that of the entries that count, and so is the ratio
    of two MSEs.

    Args:
        x: Shape (..., B, \\*sample).
        mask: Which entries count, bool, (B, ...) broadcastable to the samples, at least one per sample; None: all.
    """
    if mask is None:
        return x
    kept = mask.expand(x.shape[x.ndim - mask.ndim :])
    share = kept.flatten(1).to(torch.float64).mean(dim=1)
    scale = share.rsqrt().to(x.dtype).view(-1, *(1,) * (mask.ndim - 1))
    return torch.where(kept, x * scale, 0.0)


def psnr_loss(x: Tensor, reference: Tensor) -> Tensor:
    """log ||x_n - x(1)||^2 per sample, shape (B,): the summand of BNS eq. 13, whose printed sign is wrong.

    Its mean over samples is minimised: the mean of logs, not the log of the mean.
    """
    return torch.log(per_sample_mse(x, reference).clamp_min(MSE_FLOOR))


def rmse_loss(x: Tensor, reference: Tensor) -> Tensor:
    """||x_n - x(1)|| per sample, shape (B,): the summand of the global truncation error (BST eq. 6).

    Its mean over samples is minimised: the mean of roots, not the root of the mean.
    """
    return per_sample_mse(x, reference).clamp_min(MSE_FLOOR).sqrt()


def psnr_db(mse: Tensor, data_range: float) -> Tensor:
    """10 log10(range^2 / MSE) of per-sample errors, dB; +inf for an exact sample.

    Args:
        mse: Per-sample mean squared error.
        data_range: Largest minus smallest value of the data, e.g. 2 for data in [-1, 1].
    """
    return 20 * math.log10(data_range) - 10 * torch.log10(mse)
