"""What is asked of a distillation at the least cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from orchestrator.errors import UserError
from solvers.ns import MAX_NFE

BeginningChoice = Literal["auto", "held", "time", "free"]


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """What is asked of a distillation at the least cost. Equal settings on one model give equal thetas.

    Attributes:
        nfe: Numbers of velocity evaluations; one theta is distilled for each.
        guidance_scale: Guidance scale (1 is unguided), or the lower and upper end of a range that one theta serves.
        budget: Velocity evaluations, each of one sample, that everything together may take; None: as many as are
            needed until validation stops improving.
        beginning: How theta begins, see :class:`solvers.families.bns.BNS`; 'auto': as free as the model's exporters
            allow.
        seed: Seed of the training pairs and of the order of batches.

    Raises:
        UserError: A value is out of range.
    """

    nfe: tuple[int, ...]
    guidance_scale: float | tuple[float, float] = 1.0
    budget: int | None = None
    beginning: BeginningChoice = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.nfe:
            raise UserError("a distillation needs at least one NFE, such as 8")
        for nfe in self.nfe:
            if not 1 <= nfe <= MAX_NFE:
                raise UserError(f"NFE is {nfe}; give a whole number from 1 to {MAX_NFE}")
        if len(set(self.nfe)) != len(self.nfe):
            raise UserError(f"NFE lists a value twice: {', '.join(map(str, self.nfe))}; give each one once")
        for scale in self.guidance_scales:
            if not math.isfinite(scale):
                raise UserError(f"guidance scale is {scale}; give a finite number (1 is unguided)")
        if len(self.guidance_scales) == 2 and not self.guidance_scales[0] < self.guidance_scales[1]:
            low, high = self.guidance_scales
            raise UserError(
                f"the range of guidance scales runs from {low:g} to {high:g}; give its lower end first, or a single "
                f"number"
            )
        if self.budget is not None and self.budget < 1:
            raise UserError(f"budget is {self.budget}; give a positive number of velocity evaluations")
        if self.beginning not in get_args(BeginningChoice):
            choices = ", ".join(get_args(BeginningChoice))
            raise UserError(f"beginning is {self.beginning!r}; choose one of {choices}")
        if not 0 <= self.seed < 1000:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to 999")

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The guidance scale alone, or both ends of the range."""
        scale = self.guidance_scale
        return scale if isinstance(scale, tuple) else (scale,)
