"""BNS for a range of guidance scales: one theta whose numbers are linear in the guidance scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from solvers.families.base import GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.guided import GuidedSolver, check_range, share_of
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler


@dataclass(frozen=True)
class BNSGuided(LearnableFamily):
    """Bespoke non-stationary solvers for a range of guidance scales.

    theta is linear in the guidance scale w. Its parameters are BNS's at the lower end, then those at the upper end, so
    that it is learned on several scales at once: the normal equations of a scale at the share s = (w - low) /
    (high - low) enter as H_w times [[(1-s)^2, s(1-s)], [s(1-s), s^2]], a Kronecker product. Times lie in the domain at
    every scale, because they do at both ends. A start is the same solver at every scale, or one at each end.

    Numbers are linear in w on the raw velocity. sigma0 therefore decides only the start: the scale-time transform that
    folds it into theta is not linear in the times.

    Attributes:
        low, high: The range of guidance scales.
        beginning: As for BNS.

    Raises:
        ValueError: ``low`` is not below ``high``, or ``beginning`` is unknown.
    """

    low: float = 1.0
    high: float = 5.0
    beginning: Literal["held", "time", "free"] = "held"
    source = "Shaul et al. 2024 (BNS), Algorithm 1; section 6 asks for it"

    def __post_init__(self) -> None:
        check_range(self.guidance_range)
        _ = self.inner  # checks ``beginning``

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The lower and the upper end."""
        return (self.low, self.high)

    @property
    def inner(self) -> BNS:
        """The family of the solver at one guidance scale."""
        return BNS(beginning=self.beginning)

    @property
    def label(self) -> str:
        return f"{self.inner.label}, guidance range"

    def freedom(self, nfe: int) -> int:
        return self.inner.freedom(nfe)

    def at(self, guidance_scale: float) -> LearnableFamily:
        return _AtScale(self, share_of(self.guidance_range, guidance_scale))

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        raw = solver.to_ns(scheduler)
        return self.start_between(raw, raw, scheduler)

    def start_between(self, lower: NSSolver, upper: NSSolver, scheduler: Scheduler) -> Tensor:
        """Parameters at which theta equals ``lower`` and ``upper`` at the two ends of the range.

        Args:
            lower, upper: Solvers of one NFE, acting on the raw velocity; equal for a theta without guidance.
            scheduler: Scheduler of that velocity.

        Raises:
            ValueError: The family cannot equal one of them, or they differ in NFE or in where they begin.
        """
        ends = [self.inner.start_from(solver, scheduler) for solver in (lower, upper)]
        if len(ends[0]) != len(ends[1]):
            raise ValueError(
                f"the solvers at the two ends of a guidance range must agree in NFE and begin alike, but they have "
                f"{len(ends[0])} and {len(ends[1])} learned numbers; start from one solver, or two that begin at t_min"
            )
        return torch.cat(ends)

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        """The solver in the middle of the range; :meth:`at` gives the others."""
        return _AtScale(self, 0.5).to_ns(parameters, scheduler, sigma0)

    def to_guided(self, parameters: Tensor, scheduler: Scheduler) -> GuidedSolver:
        """The solvers of the whole range at ``parameters``."""
        lower, upper = (self.inner.to_ns(end, scheduler, 1.0) for end in _ends(parameters))
        return GuidedSolver(lower, upper, self.guidance_range)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        return torch.cat([self.inner.project(end, scheduler, 1.0) for end in _ends(parameters)])


@dataclass(frozen=True)
class _AtScale(LearnableFamily):
    """The family at one guidance scale, with the parameters of the whole range.

    Attributes:
        family: The family of the range.
        share: Position of the scale in the range, 0 to 1.
    """

    family: BNSGuided
    share: float
    source = BNSGuided.source

    @property
    def label(self) -> str:
        return self.family.label

    def start(self, solver: GridSolver, scheduler: Scheduler) -> Tensor:
        return self.family.start(solver, scheduler)

    def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
        lower, upper = _ends(parameters)
        return self.family.inner.to_ns(torch.lerp(lower, upper, self.share), scheduler, 1.0)

    def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
        return self.family.project(parameters, scheduler, sigma0)


def _ends(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters at the lower and at the upper end."""
    half = len(parameters) // 2
    return parameters[:half], parameters[half:]


FAMILY = BNSGuided
