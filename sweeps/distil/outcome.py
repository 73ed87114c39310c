"""What a distillation at the least cost leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orchestrator.results.bill import Bill
from orchestrator.results.truth import Truth
from solvers.theta import ThetaArtifact
from sweeps.distil.plan import Plan
from sweeps.point import SolverChoice

Ending = Literal["converged", "budget", "stalled"]
"""Why a distillation ended. 'converged': validation stopped improving. 'budget': the rest does not pay for another
iteration. 'stalled': no step lowers the loss any more."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The theta of one NFE, and how it compares.

    All PSNRs are means over the validation pairs, in dB; over a range of guidance scales, the mean of its scales.

    Attributes:
        nfe: Number of velocity evaluations.
        artifact: theta and its provenance.
        psnr_db: PSNR of theta.
        best_fixed: The best fixed solver of the race.
        best_fixed_psnr_db: Its PSNR.
        start: The solver that the distillation started from.
        start_psnr_db: PSNR of theta before the first iteration.
        history: Velocity evaluations that the command had spent, and PSNR of theta, at each validation.
        status: Why it ended.
        training_pairs: Number of training pairs of the last iteration, per guidance scale.
        validation: Names of the validation pairs, by guidance scale.
        train: Names of the training pairs, by guidance scale.
        notes: What a reader should know, in sentences: pairs that were added, ground truth that was made again.
    """

    nfe: int
    artifact: ThetaArtifact
    psnr_db: float
    best_fixed: SolverChoice
    best_fixed_psnr_db: float
    start: SolverChoice
    start_psnr_db: float
    history: list[tuple[int, float]]
    status: Ending
    training_pairs: int
    validation: dict[float, str]
    train: dict[float, str]
    notes: list[str] = field(default_factory=list)

    @property
    def gain_db(self) -> float:
        """PSNR of theta above that of the best fixed solver, dB."""
        return self.psnr_db - self.best_fixed_psnr_db


@dataclass(frozen=True, kw_only=True)
class DistilOutcome:
    """What a distillation leaves.

    Attributes:
        results: One per NFE.
        bill: What everything cost, also what an earlier, killed command had done.
        plan: What was planned before it began.
        truths: Facts about the ground truth of the validation pairs, by guidance scale.
        key: Folder of the storage with its state, from which equal settings resume or return at once.
    """

    results: dict[int, Distilled]
    bill: Bill
    plan: Plan
    truths: dict[float, Truth]
    key: str
