"""Measurements that adapter tests share: agreement of a velocity field with the library's own sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.base import ModelAdapter
from orchestrator.pairs.ground_truth import solve

LABELS = torch.tensor([0, 2, 1, 0])
GUIDANCE = 2.5


def noise(shape: tuple[int, ...], seed: int = 0, count: int = len(LABELS)) -> Tensor:
    """Standard normal noise in float64 for ``count`` samples."""
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float((actual - expected).norm() / expected.norm())


def influences(model: ModelAdapter) -> dict[str, float]:
    """Relative change of the velocity when one of its inputs changes, per input."""
    scheduler = model.scheduler
    # Noise and data have equal weight there. Near the ends, the velocity depends almost only on the state.
    middle, later = scheduler.time_at_lambda(0.0), scheduler.time_at_lambda(0.7)
    x = noise(model.shape) * float(torch.hypot(scheduler(middle).alpha, scheduler(middle).sigma))

    def velocity(x: Tensor = x, t: Tensor = middle, labels: Tensor = LABELS, scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            return model.field(labels, scale)(x, t)

    plain = velocity()
    changed = {
        "x": velocity(x=x.roll(1, dims=0)),
        "t": velocity(t=later),
        "condition": velocity(labels=LABELS.roll(1)),
        "guidance": velocity(scale=GUIDANCE),
    }
    return {name: distance(value, plain) for name, value in changed.items()}


def errors(
    model: ModelAdapter, sampler: Callable[[Tensor, int], Tensor], steps: tuple[int, ...], guidance_scale: float = 1.0
) -> list[float]:
    """Relative errors of the library's own sampler at these numbers of steps, against the ground truth."""
    x0 = noise(model.shape)
    truth = solve(model.field(LABELS, guidance_scale), x0, rtol=1e-7, atol=1e-7).x1
    with torch.no_grad():
        return [distance(sampler(x0, count), truth) for count in steps]


def guided(predict: Callable[[Tensor], Any], dropped: Tensor, scale: float) -> Any:
    """Classifier-free guidance: the unconditional prediction plus ``scale`` times the difference to the conditional."""
    if scale == 1:
        return predict(LABELS)
    unconditional = predict(dropped)
    return unconditional + scale * (predict(LABELS) - unconditional)
