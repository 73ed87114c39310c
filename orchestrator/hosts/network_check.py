"""Checks a network when a host first uses it: the same sample has the same velocity, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.pairs import Condition
from orchestrator.pairs.ground_truth import check_first_velocity
from orchestrator.randomness import noise
from solvers.field import VelocityField

SAMPLES = 4
"""Samples of each of the two evaluations."""

EVALUATIONS = 2 * SAMPLES
"""Velocity evaluations, each of one sample, that a network takes that passes the check."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative RMS difference between two velocities of one sample that counts as rounding, by the dtype of the
network's weights: some kernels of GPUs add in any order, so that equal inputs do not give equal bits."""

HALF_TOLERANCE = 3e-2
"""The same for networks in half precision, whose numbers have 8 or 11 bits."""


class NetworkChange(NamedTuple):
    """How a network's velocity of a sample changes though the sample, its time and its condition do not.

    Attributes:
        batch: Largest relative RMS change when another sample of the batch changes.
        repeat: The same when nothing changes; 0 unless ``batch`` is beyond the tolerance.
    """

    batch: float
    repeat: float

    def reason(self, dtype: torch.dtype) -> str | None:
        """Why no results can be computed with it, with the remedy; None if they can."""
        if self.batch <= tolerance(dtype):
            return None
        if self.repeat <= tolerance(dtype):
            return (
                f"the velocity of a sample depends on the other samples of its batch (it changes by {self.batch:.2g} "
                f"of its size), so results would depend on the batch size. The likely cause is batch normalisation in "
                f"training mode, as in a TorchScript that was traced before net.eval(); export the network in "
                f"evaluation mode"
            )
        return (
            f"the network is not deterministic: the same input gives velocities that differ by {self.repeat:.2g} of "
            f"their size, so neither ground truth nor samples can be reproduced. The likely cause is dropout that "
            f"eval() does not switch off: a TorchScript that was traced in training mode, or F.dropout without "
            f"training=self.training; export the network after net.eval(), or pass that argument"
        )


def tolerance(dtype: torch.dtype) -> float:
    """Largest change that counts as rounding, for a network of this dtype."""
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


def measure_network(
    shape: tuple[int, ...], field_of: Callable[[Condition], VelocityField], condition: Condition, limit: float = 0.0
) -> NetworkChange:
    """Measure it in two evaluations of :data:`SAMPLES` samples, which differ in their last sample only.

    It takes a third one if the others differ as well, by more than ``limit``.

    Args:
        shape: Shape of one sample.
        field_of: The velocity field of a batch with a condition.
        condition: Conditions of a batch; its first ones are used.
        limit: Change that needs no third evaluation.

    Raises:
        NotFiniteError: A velocity is not finite.
    """
    field = field_of(condition[torch.arange(SAMPLES, device=condition.device) % len(condition)])
    scheduler = field.scheduler
    # In the middle of the path, rounding in the network is rounding of the same relative size in the velocity.
    t = torch.tensor((scheduler.t_min + scheduler.t_max) / 2, dtype=torch.float64)
    x = float(scheduler.sigma(t)) * torch.from_numpy(noise(0, range(SAMPLES + 1), shape)).to(condition.device)
    batch, other_batch = x[:SAMPLES], torch.cat([x[: SAMPLES - 1], x[SAMPLES:]])
    with torch.no_grad():
        first = field(batch, t)
        check_first_velocity(first, t)
        change = _difference(first, field(other_batch, t))
        return NetworkChange(change, 0.0 if change <= limit else _difference(first, field(batch, t)))


def check_network(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    field_of: Callable[[Condition], VelocityField],
    condition: Condition,
) -> None:
    """Refuse a network whose velocity of a sample is not a function of the sample, its time and its condition.

    Args:
        name: Name of the model, for the message.
        dtype: Dtype of the network's weights.
        shape, field_of, condition: As for :func:`measure_network`.

    Raises:
        ConfigError: The network is not deterministic, or a velocity depends on the other samples of the batch.
        NotFiniteError: A velocity is not finite.
    """
    change = measure_network(shape, field_of, condition, tolerance(dtype))
    if (reason := change.reason(dtype)) is not None:
        raise ConfigError(f"with {name}, {reason}")


def _difference(first: Tensor, second: Tensor) -> float:
    """The largest relative RMS difference of the samples that both batches hold: all but the last."""
    a, b = first[:-1].double().flatten(1), second[:-1].double().flatten(1)
    difference, size = (a - b).square().mean(dim=1).sqrt(), a.square().mean(dim=1).sqrt()
    return float(torch.where(difference == 0, 0.0, difference / size).max())
