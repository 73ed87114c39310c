"""What a distillation will take, before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.progress import counted
from orchestrator.results.bill import Item, duration


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a distillation will take.

    Attributes:
        training_pairs, validation_pairs: Pairs at the beginning, per guidance scale.
        tolerance: Tolerance of ground truth at the beginning.
        evaluations: Expected velocity evaluations by item, each of one sample.
        limit: Velocity evaluations that may be spent; None: no limit.
        seconds_per_evaluation: Measured time of a velocity evaluation per sample, in the largest batch that was timed.
        hosts: Hosts that share the work.
        memory_bytes: Memory of a host's distillation step, beside the model.
    """

    training_pairs: int
    validation_pairs: int
    tolerance: float
    evaluations: dict[Item, int]
    limit: int | None
    seconds_per_evaluation: float
    hosts: int
    memory_bytes: int

    @property
    def total(self) -> int:
        """Expected velocity evaluations."""
        return sum(self.evaluations.values())

    @property
    def seconds(self) -> float:
        """Expected duration."""
        return self.total * self.seconds_per_evaluation / self.hosts

    def sentence(self) -> str:
        """The plan as a sentence."""
        most = "" if self.limit is None else f" (at most {self.limit:,})"
        pairs = f"{counted(self.training_pairs, 'training pair')} and {self.validation_pairs:,} for validation"
        return (
            f"about {self.total:,} velocity evaluations{most}, {duration(self.seconds)} at "
            f"{1 / self.seconds_per_evaluation:,.4g} evaluations per second; {pairs} to begin with; "
            f"{self.memory_bytes / 1e6:,.0f} MB beside the model"
        )
