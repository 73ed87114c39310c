"""Runs several NS solvers of equal NFE in one batch, so that one network call serves all of them.

Distilling many theta at once fills a device that a single small batch would leave mostly idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ns import nfe_of_flat


def sample_batched(thetas: Tensor, velocity: VelocityField, x0: Tensor) -> Tensor:
    """Run Algorithm 1 of the BNS paper for k solvers, each on its own B samples.

    Equals ``NSSolver.from_flat(thetas[i]).sample(u_i, x0[i])`` for every i, up to the rounding differences of the
    network between batch sizes. Differentiable in ``thetas``: the gradient of each row comes from its own samples
    alone. The memory held for the backward pass is n states, plus the network's own activations.

    Args:
        thetas: Flat vectors (:meth:`NSSolver.flat`) as rows, shape (k, n(n+5)/2 + 1), float64, on the CPU.
        velocity: The field of all k B samples, ordered by solver. It is called with one time per sample, (k B,).
        x0: Noise ~ N(0, I), shape (k, B, ...).

    Returns:
        The samples x_n, with the shape and dtype of ``x0``.

    Raises:
        InvalidThetaError: The row length does not correspond to any n.
        ValueError: The numbers of thetas and of batches differ.
    """
    if thetas.ndim != 2 or len(thetas) != len(x0):
        raise ValueError(
            f"thetas of shape {tuple(thetas.shape)} for {len(x0)} batches of samples; give one row per batch"
        )
    n = nfe_of_flat(thetas.shape[1])
    times, a, b = thetas[:, :n], thetas[:, n : 2 * n + 1], thetas[:, 2 * n + 1 :]
    shape = (len(x0), *(1,) * (x0.ndim - 1))
    a, b = (weights.to(device=x0.device, dtype=x0.dtype) for weights in (a, b))
    velocities: list[Tensor] = []
    x = a[:, 0].view(shape) * x0
    for k in range(n):
        sample_times = times[:, k].repeat_interleave(x0.shape[1])
        velocities.append(velocity(x.flatten(0, 1), sample_times).view_as(x0))
        x = a[:, k + 1].view(shape) * x0
        first = k * (k + 1) // 2  # offset of row k + 1 in the flat lower triangle
        for j, past in enumerate(velocities):
            # The velocities are not stacked: autograd then keeps references to them instead of a copy per row.
            x = torch.addcmul(x, b[:, first + j].view(shape), past)
    return x
