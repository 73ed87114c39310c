"""Interpolatory quadrature: weights of past values in the integral of their interpolation polynomial."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.families.base import as_dtype


def moment_weights(nodes: Tensor, moments: Tensor) -> Tensor:
    """Weights w with sum_j w_j p(nodes_j) = sum_d moments_d p_d for polynomials p(v) = sum_d p_d v^d of degree < k.

    If ``moments`` are the integrals of 1, v, v^2, …, the weights integrate the polynomial through the values at
    ``nodes``. The system is well conditioned if the nodes are of order 1.

    Args:
        nodes: Distinct positions, shape (k,), float64.
        moments: Values of the functional on 1, v, …, v^(k-1), shape (k,), float64.

    Returns:
        Shape (k,), float64, differentiable in both.
    """
    degrees = torch.arange(len(nodes), dtype=torch.float64)
    return torch.linalg.solve(nodes.unsqueeze(0) ** degrees.unsqueeze(1), moments)


def weighted_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """sum_j w_j v_j in the dtype of the values; ``weights`` of shape (k,), float64, for k >= 1 values."""
    first, *rest = (as_dtype(weight, value) * value for weight, value in zip(weights, values, strict=True))
    return sum(rest, first)
