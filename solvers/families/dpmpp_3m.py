"""DPM-Solver++(3M)."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._dpmpp import DPMppMultistep


@dataclass(frozen=True)
class DPMpp3M(DPMppMultistep):
    """Third-order multistep exponential integrator in the data prediction, as implemented by the authors (Lu et al.).

    The first and the last step have first order and their neighbours second order, as in the reference implementation
    for fewer than 15 steps, but here for any number of steps. A prediction in pure noise (log-SNR = -inf) has no
    weight, so the two steps after it lose one order.

    The second difference has half the weight that integrating the interpolation polynomial gives, to match the
    reference implementation; exponential_multistep with prediction='sample' has the full weight.
    """

    source = "Lu et al. 2022 (DPM-Solver++), reference implementation of the third-order multistep update"
    label = "DPM++(3M)"
    highest = 3


FAMILY = DPMpp3M
