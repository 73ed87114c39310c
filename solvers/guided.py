"""Solvers for a range of guidance scales, whose numbers are linear in the guidance scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from solvers.ns import InvalidThetaError, NSSolver

NARROW = 2.0
"""Width of a range up to which three scales determine numbers that are linear in the scale; wider ones get five."""


@dataclass(frozen=True)
class GuidedSolver:
    """A solver for every guidance scale in a range: times, a and b are linear in the scale between the range's ends.

    Attributes:
        lower: The solver at the lower end of the range.
        upper: The solver at its upper end, of the same NFE.
        guidance_range: The lower and the upper end.

    Raises:
        InvalidThetaError: The two solvers differ in NFE, or the range is not one.
    """

    lower: NSSolver
    upper: NSSolver
    guidance_range: tuple[float, float]

    def __post_init__(self) -> None:
        if self.lower.nfe != self.upper.nfe:
            raise InvalidThetaError(
                f"the solvers at the two ends of a guidance range take the same number of evaluations, got "
                f"{self.lower.nfe} and {self.upper.nfe}"
            )
        check_range(self.guidance_range)

    @property
    def nfe(self) -> int:
        """Velocity evaluations per sample."""
        return self.lower.nfe

    def at(self, guidance_scale: float) -> NSSolver:
        """The solver for ``guidance_scale``.

        Raises:
            InvalidThetaError: The scale is outside the range.
        """
        share = share_of(self.guidance_range, guidance_scale)
        low, high = self.lower, self.upper
        pairs = ((low.times, high.times), (low.a, high.a), (low.b, high.b))
        return NSSolver(*(torch.lerp(x, y, share) for x, y in pairs))


def check_range(guidance_range: tuple[float, float]) -> None:
    """Check that the two ends of a range of guidance scales are finite, and in order.

    Raises:
        InvalidThetaError: They are not.
    """
    low, high = guidance_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InvalidThetaError(
            f"a range of guidance scales has a lower and a higher end, got {low:g} and {high:g}; for a single scale, "
            f"use a solver of that scale"
        )


def share_of(guidance_range: tuple[float, float], guidance_scale: float) -> float:
    """The position of a guidance scale in a range: 0 at its lower end, 1 at its upper end.

    Raises:
        InvalidThetaError: The scale is outside the range.
    """
    low, high = guidance_range
    if not low <= guidance_scale <= high:
        raise InvalidThetaError(
            f"guidance_scale {guidance_scale:g} is outside the range that this theta was made for, {low:g} to "
            f"{high:g}; choose one inside it, or distil a theta for {guidance_scale:g}"
        )
    return (guidance_scale - low) / (high - low)


def learning_scales(guidance_range: tuple[float, float]) -> tuple[float, ...]:
    """The guidance scales to learn a range on, evenly spaced from end to end: three for a narrow range, or five."""
    check_range(guidance_range)
    low, high = guidance_range
    count = 3 if high - low <= NARROW else 5
    return (low, *(low + (high - low) * k / (count - 1) for k in range(1, count - 1)), high)
