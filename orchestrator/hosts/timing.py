"""How long a velocity evaluation takes, by batch size: what a plan of a distillation is computed from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from orchestrator.pairs import Condition
from orchestrator.pairs.ground_truth import check_first_velocity
from orchestrator.randomness import noise
from solvers.field import VelocityField

LONG_ENOUGH = 0.005
"""Seconds of a call that is timed once: shorter ones are decided by chance, and are timed :data:`CALLS` times."""

CALLS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Duration of velocity evaluations on one host.

    Attributes:
        seconds: Seconds per velocity evaluation, each of one sample, by batch size.
        evaluations, forwards: Velocity evaluations, and forwards of the network, spent on it.
        state_bytes: Memory of one sample's state or velocity, float32.
    """

    seconds: dict[int, float]
    evaluations: int
    forwards: int
    state_bytes: int


def time_field(
    field_of: Callable[[Condition], VelocityField],
    condition: Condition,
    shape: tuple[int, ...],
    batch_sizes: Sequence[int],
) -> dict[int, float]:
    """Seconds per velocity evaluation by batch size, after one call of the smallest batch as a warm-up.

    Args:
        field_of: The velocity field of a batch with a condition.
        condition: Conditions of at least the largest batch.
        shape: Shape of one sample.
        batch_sizes: Sizes to time.

    Raises:
        NotFiniteError: A velocity is not finite.
    """
    sizes = sorted(set(batch_sizes))
    x0 = torch.from_numpy(noise(0, range(sizes[-1]), shape)).to(condition.device)

    def call(size: int) -> float:
        field = field_of(condition[:size])
        t = torch.tensor((field.scheduler.t_min + field.scheduler.t_max) / 2, dtype=torch.float64)
        begin = time.perf_counter()
        velocity = field(x0[:size].clone(), t)  # a field may change its input in place
        velocity.flatten()[0].item()  # an accelerator answers before it has computed
        seconds = time.perf_counter() - begin
        check_first_velocity(velocity, t)
        return seconds

    with torch.no_grad():
        call(sizes[0])
        return {size: _shortest(partial(call, size)) / size for size in sizes}


def _shortest(timed: Callable[[], float]) -> float:
    first = timed()
    return first if first >= LONG_ENOUGH else min(first, *(timed() for _ in range(CALLS - 1)))
