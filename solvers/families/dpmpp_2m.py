"""DPM-Solver++(2M)."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.families._dpmpp import DPMppMultistep


@dataclass(frozen=True)
class DPMpp2M(DPMppMultistep):
    """Second-order multistep exponential integrator in the data prediction (Lu et al. 2022b, Algorithm 2).

    The first step has first order, and so has the last of fewer than 10 steps, as in the authors' code. So do steps
    that begin or end at infinite log-SNR, and the step after one that begins there.
    """

    source = "Lu et al. 2022 (DPM-Solver++), Algorithm 2"
    short = "DPM++(2M)"
    highest = 2


FAMILY = DPMpp2M
