"""The error of ground truth itself: a few pairs are solved again, at a tenth of the tolerance or on half the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.pairs.ground_truth import NotFiniteError, halved, solve, solve_on_steps
from solvers.field import CountingField, VelocityField
from solvers.losses import counted, per_sample_mse, psnr_db

PAIRS = 8
"""Pairs that are solved again by default."""

TIGHTER = 10.0
"""Factor between the tolerance of ground truth and that of the solution it is compared with."""

PATIENCE = 8
"""Limit on the evaluations of the tighter solution, as a multiple of those of ground truth.

A tenth of the tolerance takes about 1.6 times the evaluations. It takes many times more only if the tolerance is below
the rounding of the network.
"""


@dataclass(frozen=True)
class Accuracy:
    """The error of some pairs' ground truth.

    Attributes:
        rms: RMS difference from the tighter solution, per sample; empty if there is none.
        evaluations: Velocity evaluations spent, each of one sample.
        problem: Why there is no tighter solution; None if there is one.
    """

    rms: tuple[float, ...]
    evaluations: int
    problem: str | None = None

    def psnr_db(self, data_range: float, exact_db: float) -> float | None:
        """The PSNR that corresponds to the error, dB: the mean over samples, as for solvers; None if unknown.

        Args:
            data_range: Largest minus smallest value of the data.
            exact_db: Value of a sample that does not move at all, dB.
        """
        if not self.rms:
            return None
        values = psnr_db(torch.tensor(self.rms, dtype=torch.float64).square(), data_range)
        return float(values.clamp(max=exact_db).mean())


class _TooManyError(Exception):
    """The tighter solution takes more evaluations than allowed."""


class _LimitedField(CountingField):
    """A field that may be evaluated ``limit`` times."""

    def __init__(self, field: VelocityField, limit: int):
        super().__init__(field)
        self.limit = limit

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.nfe >= self.limit:
            raise _TooManyError
        return super().__call__(x, t)


def accuracy(
    velocity: VelocityField,
    x0: Tensor,
    x1: Tensor,
    rtol: float,
    atol: float,
    *,
    limit: int,
    mask: Tensor | None = None,
    steps: Sequence[float] | None = None,
) -> Accuracy:
    """Compare ground truth with solutions at a tenth of its tolerances, or on its steps split in two.

    Args:
        velocity: The field of these pairs.
        x0: Their noise, (N, ...), float32.
        x1: Their ground truth, (N, ...).
        rtol, atol: Tolerances of ground truth.
        limit: Largest number of evaluations of the batch; :data:`PATIENCE` times those of ground truth are enough.
        mask: Which entries count, see :func:`solvers.losses.counted`.
        steps: Times of the steps of ground truth, if it was solved on given ones.
    """
    limited = _LimitedField(velocity, limit)
    try:
        if steps is None:
            tighter = solve(limited, x0, rtol / TIGHTER, atol / TIGHTER).x1
        else:
            tighter = solve_on_steps(limited, x0, halved(steps)).x1
    except _TooManyError:
        problem = (
            f"a tenth of the tolerance takes more than {limit} evaluations: rounding in the network is larger than "
            f"the tolerance"
        )
        return Accuracy((), limited.nfe * len(x0), problem)
    except NotFiniteError as error:
        tightened = "a tenth of the tolerance" if steps is None else "half the steps"
        return Accuracy((), limited.nfe * len(x0), f"at {tightened}, {error}")
    rms = per_sample_mse(counted(x1.to(tighter.dtype), mask), counted(tighter, mask)).sqrt()
    return Accuracy(tuple(rms.tolist()), limited.nfe * len(x0))
