"""Betas of discrete variance-preserving paths, by the names that authors and diffusers give their schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

DEFAULT_COUNT = 1000
MAX_BETA = 0.999
"""Largest beta of the cosine schedule (Nichol & Dhariwal 2021)."""


def linear_betas(beta_start: float = 1e-4, beta_end: float = 0.02, count: int = DEFAULT_COUNT) -> tuple[float, ...]:
    """``count`` linearly increasing betas: 'linear' in diffusers, with DDPM's values (Ho et al. 2020)."""
    return tuple(torch.linspace(beta_start, beta_end, count, dtype=torch.float64).tolist())


def scaled_linear_betas(
    beta_start: float = 0.00085, beta_end: float = 0.012, count: int = DEFAULT_COUNT
) -> tuple[float, ...]:
    """``count`` betas with linearly increasing roots: 'scaled_linear' in diffusers, with Stable Diffusion's values."""
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), count, dtype=torch.float64)
    return tuple((roots**2).tolist())


def quadratic_betas(beta_start: float = 1e-4, beta_end: float = 0.02, count: int = DEFAULT_COUNT) -> tuple[float, ...]:
    """The formula of :func:`scaled_linear_betas` with DDPM's values: 'quad' in DDIM's code (Song et al. 2020)."""
    return scaled_linear_betas(beta_start, beta_end, count)


def cosine_betas(count: int = DEFAULT_COUNT) -> tuple[float, ...]:
    """min(1 - f((k+1)/N) / f(k/N), 0.999) with f(s) = cos^2((s + 0.008) / 1.008 pi/2) (Nichol & Dhariwal 2021).

    It is 'squaredcos_cap_v2' in diffusers.
    """

    def kept(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    return tuple(min(1 - kept((k + 1) / count) / kept(k / count), MAX_BETA) for k in range(count))


SCHEDULES: dict[str, Callable[..., tuple[float, ...]]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "quadratic": quadratic_betas,
    "cosine": cosine_betas,
}


def named_betas(options: Mapping[str, Any]) -> tuple[float, ...]:
    """The betas of ``{schedule, start, end, count}``; all but the schedule have its authors' values as defaults.

    Raises:
        ValueError: An option is missing, unknown, out of range or without effect; the message names the remedy.
    """
    unknown = sorted(map(str, options.keys() - {"schedule", "start", "end", "count"}))
    if unknown:
        raise ValueError(f"betas has no option {unknown[0]!r}; its options are: schedule, start, end, count")
    schedule = options.get("schedule")
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedule of betas must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    count = options.get("count", DEFAULT_COUNT)
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"the count of betas must be a whole number of timesteps, at least 2, got {count!r}")
    ends = {f"beta_{name}": options[name] for name in ("start", "end") if name in options}
    if schedule == "cosine" and ends:
        raise ValueError("the cosine schedule of betas has no start and no end; leave them out")
    for name, value in ends.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"the {name.removeprefix('beta_')} of betas must lie between 0 and 1, got {value!r}")
    return SCHEDULES[schedule](count=count, **ends)
