"""What is learned: BNS for one guidance scale, or for a range of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.families.bns import BNS, Beginning
from solvers.families.bns_guided import BNSGuided
from solvers.guided import GuidedSolver, learning_scales
from solvers.ns import NSSolver
from solvers.schedulers.base import Scheduler

NUDGE = 0.02
"""Share of the domain by which the first time of a start is moved alone."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The family that is learned, and the guidance scales that it is learned on.

    Attributes:
        beginning: Which numbers of theta's beginning are learned.
        guidance_scales: The guidance scale alone, or both ends of a range.
    """

    beginning: Beginning
    guidance_scales: tuple[float, ...]

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range of guidance scales; None if there is one scale."""
        if len(self.guidance_scales) == 1:
            return None
        low, high = self.guidance_scales
        return low, high

    @property
    def scales(self) -> tuple[float, ...]:
        """Guidance scales of the pairs, in rising order."""
        return self.guidance_scales if self.guidance_range is None else learning_scales(self.guidance_range)

    @property
    def name(self) -> str:
        """Name of the family plugin."""
        return "bns" if self.guidance_range is None else "bns_guided"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the family plugin."""
        ends = {} if self.guidance_range is None else dict(zip(("low", "high"), self.guidance_range, strict=True))
        return {"beginning": self.beginning, **ends}

    def numbers(self, nfe: int) -> int:
        """Learned numbers that the pairs of one guidance scale must determine; a range has twice as many in all."""
        numbers = BNS(beginning=self.beginning).freedom(nfe)
        return numbers if self.guidance_range is None else math.ceil(2 * numbers / len(self.scales))

    def starts(self, solvers: Sequence[NSSolver], scheduler: Scheduler) -> list[tuple[int, Tensor]]:
        """Starts from solvers of the raw velocity, the most promising first: the solver's position, and parameters.

        If the beginning is learned, the first solver gives two: with its first time alone moved a little, which keeps
        its quality, and as the family moves it.
        """
        starts = [(position, self._start(solver, scheduler)) for position, solver in enumerate(solvers)]
        if self.beginning == "free":
            starts.insert(0, (0, self._start(_nudged(solvers[0], scheduler), scheduler)))
        return starts

    def _start(self, solver: NSSolver, scheduler: Scheduler) -> Tensor:
        if self.guidance_range is None:
            return BNS(beginning=self.beginning).start_from(solver, scheduler)
        return self._guided.start_between(solver, solver, scheduler)

    def solver(self, parameters: Sequence[float], scheduler: Scheduler) -> NSSolver | GuidedSolver:
        """The solver, or the solvers of the range, at these parameters."""
        values = torch.tensor(parameters, dtype=torch.float64)
        if self.guidance_range is None:
            return BNS(beginning=self.beginning).to_ns(values, scheduler, 1.0)
        return self._guided.to_guided(values, scheduler)

    @property
    def _guided(self) -> BNSGuided:
        return BNSGuided(**self.options)


def _nudged(solver: NSSolver, scheduler: Scheduler) -> NSSolver:
    """``solver`` with its first query a little after the beginning, and its first state as it is there on average."""
    times, a = solver.times.clone(), solver.a.clone()
    if float(times[0]) <= scheduler.t_min:
        times[0] = scheduler.t_min + NUDGE * (scheduler.t_max - scheduler.t_min)
        a[0] = scheduler.start(times[0])
    return NSSolver(times, a, solver.b)


def at(solver: NSSolver | GuidedSolver, guidance_scale: float) -> NSSolver:
    """The solver of one guidance scale."""
    return solver.at(guidance_scale) if isinstance(solver, GuidedSolver) else solver
