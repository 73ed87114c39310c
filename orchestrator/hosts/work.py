"""Counts of the work that a host or scorer has done since it started. Exporting them is left to the pool."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.field import VelocityField


@dataclass
class Work:
    """Totals since the process started.

    Attributes:
        pairs: Ground-truth pairs made.
        forwards: Forward passes of the model's network for any purpose, each of one sample.
        scored: Samples measured by metrics.
    """

    pairs: int = 0
    forwards: int = 0
    scored: int = 0


class MeteredField:
    """A velocity field whose evaluations are counted.

    Args:
        field: The field.
        work: Totals to which the evaluations are added.
        forwards_per_evaluation: Forward passes of the network per evaluation: two with guidance.
    """

    def __init__(self, field: VelocityField, work: Work, forwards_per_evaluation: int):
        self.field, self.work, self.forwards = field, work, forwards_per_evaluation
        self.scheduler = field.scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.work.forwards += self.forwards * len(x)
        return self.field(x, t)
