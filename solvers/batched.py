"""Several NS solvers of equal NFE run side by side in one batch: one network call serves all of them.

Knows nothing of why: distilling many theta at once fills a device that a single small batch leaves idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ns import nfe_of_flat


def sample_batched(thetas: Tensor, velocity: VelocityField, x0: Tensor) -> Tensor:
    """Algorithm 1 of the BNS paper for k solvers, each on its own B samples.

    Equals ``NSSolver.from_flat(thetas[i]).sample(u_i, x0[i])`` for every i, but for what the size of a batch does to
    the rounding of the network. Gradients flow into ``thetas``, each row's from its own samples alone. What is kept
    for them grows as n states beside what the network keeps.

    Args:
        thetas: Rows are :meth:`NSSolver.flat`, shape (k, n(n+5)/2 + 1), float64, on the CPU.
        velocity: The field of all k B samples in order, solver by solver; asked with one time a sample, (k B,).
        x0: Noise ~ N(0, I), shape (k, B, ...).

    Returns:
        The samples x_n, of the shape and dtype of ``x0``.

    Raises:
        InvalidThetaError: A row's length is that of no n.
        ValueError: Another number of thetas than of batches.
    """
    if thetas.ndim != 2 or len(thetas) != len(x0):
        raise ValueError(
            f"thetas of shape {tuple(thetas.shape)} for {len(x0)} batches of samples; give one row for each batch"
        )
    n = nfe_of_flat(thetas.shape[1])
    times, a, b = thetas[:, :n], thetas[:, n : 2 * n + 1], thetas[:, 2 * n + 1 :]
    shape = (len(x0), *(1,) * (x0.ndim - 1))
    a, b = (weights.to(device=x0.device, dtype=x0.dtype) for weights in (a, b))
    velocities: list[Tensor] = []
    x = a[:, 0].view(shape) * x0
    for k in range(n):
        asked = times[:, k].repeat_interleave(x0.shape[1])
        velocities.append(velocity(x.flatten(0, 1), asked).view_as(x0))
        x = a[:, k + 1].view(shape) * x0
        first = k * (k + 1) // 2  # of row k + 1 of the lower triangle
        for j, known in enumerate(velocities):
            # No stack of the velocities: autograd then keeps references to them, and no copy a row.
            x = torch.addcmul(x, b[:, first + j].view(shape), known)
    return x
