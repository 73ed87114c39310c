"""Heun's method."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families.base import ButcherTableau, RungeKutta


@dataclass(frozen=True)
class Heun(RungeKutta):
    """Heun's method (explicit trapezoid) on u_t: second order, two evaluations per step.

    EDM's sampler of that name differs: it steps in sigma and saves the last evaluation (see ``edm_heun``).
    """

    source = "Karras et al. 2022; BNS section 3.3.2"
    label = "Heun"
    order = 2
    tableau = ButcherTableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))


FAMILY = Heun
