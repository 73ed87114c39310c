"""DPM-Solver++(3M)."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._dpmpp import DPMppMultistep


@dataclass(frozen=True)
class DPMpp3M(DPMppMultistep):
    """Third-order multistep exponential integrator in the data prediction, as its authors' implementation has it.

    The first and the last step are of first order and their neighbours of second, as in the reference implementation
    for fewer than 15 steps; here whatever the number of steps. A prediction in pure noise (log-SNR = -inf) has no
    weight, so the two steps after it are of one order less.

    The reference weighs the second difference by half of what integrating the interpolation polynomial gives, and so
    does this family, to equal it; exponential_multistep with prediction='sample' has the full weight.
    """

    source = "Lu et al. 2022 (DPM-Solver++), reference implementation of the third-order multistep update"
    label = "DPM++(3M)"
    highest = 3


FAMILY = DPMpp3M
