"""What the states of all distillation methods share: how a run ended, and the validated iterates it may choose from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Self

Status = Literal["running", "finished", "diverged", "stalled", "stopped"]
"""'finished': all iterations done. 'diverged': numbers that are not finite, or a fall far below the start.
'stalled': no step is accepted any more. 'stopped': ended early by a search."""

DIVERGENCE_DB = 20.0
"""A validation PSNR this far below the start's counts as diverged: no run seen here has come back from there."""


class DistillationState:
    """Base of the states that a run is stored, sent and resumed as.

    A subclass is a frozen dataclass of plain numbers, strings and lists, so that it can be written as JSON, and has
    the fields named here. They are not dataclass fields of this class: each subclass orders its own.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    parameters: list[float]
    iteration: int
    status: Status
    validated: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The validated iterate of highest PSNR: the start itself where nothing improved on it.

        Raises:
            ValueError: Nothing was validated yet.
        """
        if not self.validated:
            raise ValueError("no iterate was validated yet")
        return max(self.validated, key=lambda entry: entry["psnr_db"])

    def with_validation(self, psnr_db: float) -> Self:
        """The state after a validation; notices divergence."""
        entry = {"iteration": self.iteration, "psnr_db": psnr_db, "parameters": self.parameters}
        if not math.isfinite(psnr_db):
            return dataclasses.replace(self, status="diverged")
        status: Status = self.status
        if self.validated and psnr_db < self.validated[0]["psnr_db"] - DIVERGENCE_DB:
            status = "diverged"
        return dataclasses.replace(self, status=status, validated=[*self.validated, entry])
