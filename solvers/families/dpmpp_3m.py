"""DPM-Solver++(3M)."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._dpmpp import DPMppMultistep


@dataclass(frozen=True)
class DPMpp3M(DPMppMultistep):
    """Third-order multistep exponential integrator in the data prediction, as implemented by the authors (Lu et al.).

    The first step has first order and the second second order; so have the last and the one before it of fewer than 10
    steps, as in the authors' code. A prediction in pure noise (log-SNR = -inf) has no weight, so the two steps after it
    lose one order.

    The second difference has half the weight that integrating the interpolation polynomial gives, to match the
    reference implementation; exponential_multistep with prediction='sample' has the full weight.
    """

    source = "Lu et al. 2022 (DPM-Solver++), reference implementation of the third-order multistep update"
    short = "DPM++(3M)"
    highest = 3


FAMILY = DPMpp3M
