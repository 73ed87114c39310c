"""DEIS in its variant tAB: Adams-Bashforth in time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from solvers.families._exponential import check_count, integrate_multistep, multistep_order, newest_first
from solvers.families._interpolation import moment_weights
from solvers.families.base import Family
from solvers.field import VelocityField
from solvers.schedulers.base import Scheduler

QUADRATURE_NODES = 64
"""Gauss-Legendre nodes per coefficient integral, accurate to 1e-11 on smooth paths."""

NODES_PER_PIECE = 12
"""The same between two knots of a path that is smooth only piecewise."""


@dataclass(frozen=True)
class DEIS(Family):
    """tAB-DEIS: integrates the polynomial in t through the last noise predictions exactly in sigma/alpha.

    The first steps use lower degrees, until enough predictions are known. Noise and t are finite at both ends of every
    path, so every other step has full order. diffusers' DEIS extrapolates in log-SNR instead ('logrho'), which is
    exponential_multistep with prediction='epsilon'; this family is the paper's tAB. The paper combines it with a
    t-power grid, rho = 2, which is the grid 'warped' with p = 2.

    Attributes:
        degree: Degree of the polynomial, 1 to 3; tAB3 uses four predictions.
    """

    degree: int = 3
    source = "Zhang & Chen 2023 (DEIS), eq. 14-15, tAB"

    def __post_init__(self) -> None:
        check_count("deis", "degree", self.degree, 1, 3)

    @property
    def label(self) -> str:
        return f"DEIS-tAB{self.degree}"

    @property
    def order(self) -> int:
        # The first step can only be a DDIM step, whose local error h^2 is never compensated.
        return 2

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        def weights(i: int) -> Tensor:
            order = multistep_order(self.degree + 1, i, len(times) - 1, lower_at_end=False)
            if order == 1:
                return torch.ones(1, dtype=torch.float64)
            return time_weights(velocity.scheduler, newest_first(times, i, order), times[i + 1])

        return integrate_multistep(velocity, x, times, "epsilon", weights)


def time_weights(scheduler: Scheduler, nodes: Tensor, t_next: Tensor) -> Tensor:
    """Weights of the noise predictions at ``nodes`` in their mean over sigma/alpha from ``nodes[0]`` to ``t_next``.

    The mean is that of the polynomial in t through the predictions. It is integrated over w = asinh(sigma/alpha), in
    which t is smooth both down to sigma = 0 and over many orders of magnitude of sigma/alpha, piece by piece between
    the knots of the path.

    Args:
        scheduler: Scheduler of the field.
        nodes: Times, newest first, shape (k,), float64; alpha > 0 at the first.
        t_next: End of the step, 0-d float64.

    Returns:
        Shape (k,), float64, summing to 1.
    """
    t = nodes[0]
    step = t_next - t
    knots = scheduler.knots(float(t.detach()), float(t_next.detach()))
    point = scheduler(torch.cat([t.reshape(1), knots, t_next.reshape(1)]))
    edges = torch.asinh(point.sigma / point.alpha)
    abscissae, gauss = gauss_legendre(NODES_PER_PIECE if len(knots) else QUADRATURE_NODES)
    w = (edges[:-1, None] + edges.diff()[:, None] * abscissae).flatten()
    # d(sigma/alpha) = cosh(w) dw, and snr = 1/sinh(w).
    density = (edges.diff()[:, None] * gauss).flatten() * torch.cosh(w)
    fractions = (scheduler.time_at_angle(torch.atan2(torch.ones_like(w), torch.sinh(w))) - t) / step
    powers = fractions.unsqueeze(0) ** torch.arange(len(nodes), dtype=torch.float64).unsqueeze(1)
    return moment_weights((nodes - t) / step, (powers * density).sum(1) / density.sum())


@cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Abscissae and weights of Gauss-Legendre quadrature on [0, 1], each of shape (count,), float64.

    Source: Golub & Welsch 1969, from the eigenvectors of the tridiagonal matrix of the polynomials' recurrence.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = torch.diag(k / torch.sqrt(4 * k**2 - 1), diagonal=1)
    abscissae, vectors = torch.linalg.eigh(off_diagonal + off_diagonal.T)
    return (abscissae + 1) / 2, vectors[0] ** 2


FAMILY = DEIS
