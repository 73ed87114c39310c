"""State of a distillation run: where it stands, how it ended, and its validated iterates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Status = Literal["running", "finished", "converged", "diverged", "stalled", "stopped"]
"""'finished': all iterations are done. 'diverged': numbers became non-finite, or the PSNR fell far below the start's.
'converged': validation no longer improves. 'stalled': no step is accepted any more. 'stopped': ended by a search."""

DIVERGENCE_DB = 20.0
"""A validation PSNR this far below the start's counts as diverged: no observed run has recovered from there."""

LEAST_GAIN_DB = 0.05
"""Gain of a validation PSNR that counts as an improvement when a run is to end without one."""


@dataclass(frozen=True, kw_only=True)
class DistillationState:
    """Everything needed to continue a run, as plain numbers, strings and lists that can be written as JSON.

    A method that keeps more between its iterations adds fields in a subclass.

    Attributes:
        parameters: Parameters of the learnable family.
        iteration: Number of completed iterations.
        status: 'running', or how the run ended (:data:`Status`).
        loss: Mean loss over the iterations since the last validation.
        validated: One entry per validation: iteration, psnr_db, parameters; each_psnr_db too, if there are several
            validation sets. The first is the start itself. All are kept, so that a different stopping criterion can be
            applied later.
    """

    parameters: list[float]
    iteration: int = 0
    status: Status = "running"
    loss: float | None = None
    validated: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        """The validated iterate of highest PSNR: the start itself if nothing improved on it.

        Raises:
            ValueError: No iterate has been validated yet.
        """
        if not self.validated:
            raise ValueError("no iterate has been validated yet")
        return max(self.validated, key=lambda entry: entry["psnr_db"])

    @property
    def without_gain(self) -> int:
        """Validations since the last one that was better than all before it by :data:`LEAST_GAIN_DB`."""
        reference, count = -math.inf, 0
        for entry in self.validated:
            if entry["psnr_db"] >= reference + LEAST_GAIN_DB:
                reference, count = entry["psnr_db"], 0
            else:
                count += 1
        return count

    def with_validation(self, psnr_db: float, each: Sequence[float] = (), patience: int | None = None) -> Self:
        """Return the state after a validation, with status 'diverged' if the PSNR is too low or not finite.

        Args:
            psnr_db: Mean PSNR on the validation pairs, dB.
            each: Mean PSNR on each validation set, if there are several; ``psnr_db`` is then their mean.
            patience: Validations without a gain after which a running state is 'converged'; None: never.
        """
        entry = {"iteration": self.iteration, "psnr_db": psnr_db, "parameters": self.parameters}
        if each:
            entry["each_psnr_db"] = list(each)
        if not math.isfinite(psnr_db):
            return dataclasses.replace(self, status="diverged")
        status: Status = self.status
        if self.validated and psnr_db < self.validated[0]["psnr_db"] - DIVERGENCE_DB:
            status = "diverged"
        after = dataclasses.replace(self, status=status, validated=[*self.validated, entry])
        if after.status == "running" and patience is not None and after.without_gain >= patience:
            return dataclasses.replace(after, status="converged")
        return after
