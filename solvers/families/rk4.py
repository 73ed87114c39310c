"""The classical Runge-Kutta method of order 4."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families.base import ButcherTableau, RungeKutta


@dataclass(frozen=True)
class RK4(RungeKutta):
    """Classical RK4: fourth order, four evaluations per step. Not the 3/8 rule that torchdiffeq calls rk4."""

    source = "BNS appendix C"
    label = "RK4"
    order = 4
    tableau = ButcherTableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0.0, 0.5, 0.5, 1.0)
    )


FAMILY = RK4
