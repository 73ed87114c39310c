"""RK2-Bespoke: the midpoint method on a learned scale-time transform."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._bespoke import BespokeRungeKutta
from solvers.families.midpoint import Midpoint


@dataclass(frozen=True)
class BespokeRK2(BespokeRungeKutta):
    """Bespoke scale-time midpoint: 8n - 1 learned parameters for n steps of two evaluations each (BST eq. 19-21)."""

    short = "BST-RK2"
    base = Midpoint()
    starts = ("midpoint",)


FAMILY = BespokeRK2
