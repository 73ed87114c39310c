"""Symmetric linear systems that may be singular."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_symmetric(matrix: Tensor, target: Tensor) -> Tensor:
    """Solve matrix x = target by Cholesky, or for the least-norm x if rounding left the matrix indefinite.

    Args:
        matrix: Shape (p, p), symmetric, float64.
        target: Shape (p,), float64.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return torch.cholesky_solve(target[:, None], factor).squeeze(1)
    values, vectors = torch.linalg.eigh(matrix)
    usable = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    inverse = torch.where(usable, 1 / values, 0.0)
    return vectors @ (inverse * (vectors.T @ target))
