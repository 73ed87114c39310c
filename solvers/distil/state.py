"""Common part of the states of all distillation methods: the status of the run and its validated iterates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Self

Status = Literal["running", "finished", "diverged", "stalled", "stopped"]
"""'finished': all iterations are done. 'diverged': numbers became non-finite, or the PSNR fell far below the start's.
'stalled': no step is accepted any more. 'stopped': ended early by a search."""

DIVERGENCE_DB = 20.0
"""A validation PSNR this far below the start's counts as diverged: no observed run has recovered from there."""


class DistillationState:
    """Base class of the states in which runs are stored, sent and resumed.

    A subclass is a frozen dataclass of plain numbers, strings and lists, so that it can be written as JSON, and has
    the fields declared here. They are not dataclass fields of this class, so that each subclass can order its own.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    parameters: list[float]
    iteration: int
    status: Status
    loss: float | None
    validated: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The validated iterate of highest PSNR: the start itself if nothing improved on it.

        Raises:
            ValueError: No iterate has been validated yet.
        """
        if not self.validated:
            raise ValueError("no iterate has been validated yet")
        return max(self.validated, key=lambda entry: entry["psnr_db"])

    def with_validation(self, psnr_db: float) -> Self:
        """Return the state after a validation, with status 'diverged' if the PSNR is too low or not finite."""
        entry = {"iteration": self.iteration, "psnr_db": psnr_db, "parameters": self.parameters}
        if not math.isfinite(psnr_db):
            return dataclasses.replace(self, status="diverged")
        status: Status = self.status
        if self.validated and psnr_db < self.validated[0]["psnr_db"] - DIVERGENCE_DB:
            status = "diverged"
        return dataclasses.replace(self, status=status, validated=[*self.validated, entry])
