"""What a network is evaluated at, and how its outputs become velocities, at the times of one theta.

With these numbers theta can be run on the network itself, by a program that knows neither its scheduler nor its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from solvers.scale_time import SchedulerChange
from solvers.schedulers.base import Scheduler

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class NetworkSchedule:
    """One number per evaluation of each; evaluation k is at theta's time t_k and the network's native time.

    Attributes:
        time: The network's time argument, in its own convention.
        scale: The network gets x / scale.
        alpha, sigma: Native scheduler: x / scale = alpha data + sigma noise.
        d_alpha, d_sigma: Their derivatives in native time.
        path_d_alpha, path_d_sigma: Derivatives of the scheduler of the velocity: u = path_d_alpha data +
            path_d_sigma noise.
        time_above, share: For a network of whole timesteps: its output is (1 - share) f(time) + share f(time_above).
            None for others.
    """

    time: Numbers
    scale: Numbers
    alpha: Numbers
    sigma: Numbers
    d_alpha: Numbers
    d_sigma: Numbers
    path_d_alpha: Numbers
    path_d_sigma: Numbers
    time_above: Numbers | None = None
    share: Numbers | None = None

    def to_dict(self) -> dict[str, Any]:
        """The columns as lists, without those that are None."""
        return {name: list(column) for name, column in asdict(self).items() if column is not None}

    @classmethod
    def from_dict(cls, content: Any, nfe: int) -> NetworkSchedule:
        """The inverse of :meth:`to_dict`, for content that may be arbitrary.

        Raises:
            ValueError: A column is missing or unknown, or is not ``nfe`` finite numbers.
        """
        every = [field.name for field in fields(cls)]
        optional = set(content) & {"time_above", "share"} if isinstance(content, dict) else set()
        if not isinstance(content, dict) or set(content) | {"time_above", "share"} != set(every) or len(optional) == 1:
            raise ValueError("'schedule' must have the columns time, scale, alpha, sigma and their derivatives")
        for name, column in content.items():
            if not isinstance(column, list) or len(column) != nfe or not all(map(_is_number, column)):
                raise ValueError(f"'schedule' must hold {nfe} finite numbers as its {name!r}")
        if not all(content["scale"]):
            raise ValueError("'schedule' must not divide by a 'scale' of 0")
        return cls(**{name: tuple(column) for name, column in content.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def network_schedule(
    times: Tensor,
    native: Scheduler,
    scheduler: Scheduler,
    network_time: Callable[[Tensor], Tensor],
    whole_times: Callable[[Tensor], tuple[Tensor, Tensor, Tensor] | None],
) -> NetworkSchedule:
    """The schedule of a theta that queries the velocity at ``times``, shape (n,), float64.

    Args:
        times: Times under ``scheduler``.
        native: Scheduler that the network was trained with.
        scheduler: Scheduler of the velocity.
        network_time: The network's time at native times.
        whole_times: For a network of whole timesteps, its times below and above native times, and the share of those
            above; returns None for others.
    """
    if scheduler == native:
        at, scale = times, torch.ones_like(times)
    else:
        at, scale = SchedulerChange(native, scheduler).time_and_scale(times)
    inner, outer = native(at), scheduler(times)
    time, above, share = whole_times(at) or (network_time(at), None, None)
    return NetworkSchedule(
        time=_numbers(time),
        scale=_numbers(scale),
        alpha=_numbers(inner.alpha),
        sigma=_numbers(inner.sigma),
        d_alpha=_numbers(inner.d_alpha),
        d_sigma=_numbers(inner.d_sigma),
        path_d_alpha=_numbers(outer.d_alpha),
        path_d_sigma=_numbers(outer.d_sigma),
        time_above=None if above is None else _numbers(above),
        share=None if share is None else _numbers(share),
    )


def _numbers(column: Tensor) -> Numbers:
    return tuple(column.tolist())
