"""The explicit midpoint method."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families.base import ButcherTableau, RungeKutta


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """Explicit midpoint (RK2): second order, two evaluations per step."""

    source = "BNS appendix C"
    label = "Midpoint"
    order = 2
    tableau = ButcherTableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5))


FAMILY = Midpoint
