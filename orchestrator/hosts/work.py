"""What a host or a scorer has done since it started, counted: plain numbers, which others may export."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.field import VelocityField


@dataclass
class Work:
    """Totals.

    Attributes:
        pairs: Ground-truth pairs made.
        evaluations: Forwards of the model's network, of one sample each, whatever they were for.
        scored: Samples that metrics have measured.
    """

    pairs: int = 0
    evaluations: int = 0
    scored: int = 0


class MeteredField:
    """A velocity field whose evaluations count as work.

    Args:
        field: The field.
        work: What they are added to.
        forwards_per_evaluation: Forwards of the network that one evaluation takes: two with guidance.
    """

    def __init__(self, field: VelocityField, work: Work, forwards_per_evaluation: int):
        self.field, self.work, self.forwards = field, work, forwards_per_evaluation
        self.scheduler = field.scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.work.evaluations += self.forwards * len(x)
        return self.field(x, t)
