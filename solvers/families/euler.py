"""The Euler method."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families.base import ButcherTableau, RungeKutta


@dataclass(frozen=True)
class Euler(RungeKutta):
    """Explicit Euler: first order, one evaluation per step."""

    source = "BNS appendix C"
    label = "Euler"
    order = 1
    tableau = ButcherTableau(a=((),), b=(1.0,), c=(0.0,))


FAMILY = Euler
