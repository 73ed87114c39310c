"""RK1-Bespoke: Euler's method on a learned scale-time transform."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._bespoke import BespokeRungeKutta
from solvers.families.euler import Euler


@dataclass(frozen=True)
class BespokeRK1(BespokeRungeKutta):
    """Bespoke scale-time Euler: 4n - 1 learned parameters for n steps of one evaluation each (BST eq. 17-18)."""

    short = "BST-RK1"
    base = Euler()
    starts = ("euler",)


FAMILY = BespokeRK1
