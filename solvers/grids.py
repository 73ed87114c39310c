"""Time grids: where a solver takes its steps. Each is a function of (steps, scheduler) to times t_0 < ... < t_n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.schedulers.base import Scheduler

LOG_SNR_MARGIN = 1e-3
"""Share of the domain at each end that a log-SNR grid leaves to its first and last step."""


@dataclass(frozen=True)
class Grid:
    """A named time grid.

    ``warped`` is the two-parameter family t = (1 - (1-r)^p)^q on uniform r: p > 1 crowds steps towards the data,
    q > 1 towards the noise, and p = q = 1 is uniform.

    Attributes:
        kind: 'uniform', 'warped', 'log_snr' (uniform in log-SNR) or 'polynomial' (rho = 7 in sigma/alpha, EDM's
            spacing over the scheduler's own range).
        p, q: Exponents of 'warped'; 1 for every other kind.
    """

    kind: str = "uniform"
    p: float = 1.0
    q: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown time grid {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not (self.p > 0 and self.q > 0):
            raise ValueError(f"grid exponents must be positive, got p={self.p}, q={self.q}")
        if self.kind != "warped" and (self.p, self.q) != (1.0, 1.0):
            raise ValueError(f"p and q belong to the 'warped' grid, not to {self.kind!r}")

    @property
    def label(self) -> str:
        return f"warped p={self.p:g} q={self.q:g}" if self.kind == "warped" else self.kind

    def times(self, steps: int, scheduler: Scheduler) -> Tensor:
        """Times of shape (steps + 1,), float64, from ``scheduler.t_min`` to ``scheduler.t_max`` exactly.

        Raises:
            ValueError: Fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"a time grid needs at least one step, got {steps}")
        r = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        first, last = scheduler.t_min, scheduler.t_max
        match self.kind:
            case "log_snr" | "polynomial":
                times = self._by_snr(r, scheduler)
            case _:
                warped = (1 - (1 - r) ** self.p) ** self.q
                times = first + (last - first) * warped
        times[0], times[-1] = first, last
        return times

    def _by_snr(self, r: Tensor, scheduler: Scheduler) -> Tensor:
        # Log-SNR is infinite at the ends of most paths: the grid is laid between two times just inside them, and
        # its outermost points are then moved to the ends themselves.
        margin = LOG_SNR_MARGIN * (scheduler.t_max - scheduler.t_min)
        low = scheduler.lambda_(scheduler.t_min + margin)
        high = scheduler.lambda_(scheduler.t_max - margin)
        if self.kind == "log_snr":
            lambda_ = low + r * (high - low)
        else:
            noise_low, noise_high = torch.exp(-high / 7), torch.exp(-low / 7)
            lambda_ = -7 * torch.log(noise_high + r * (noise_low - noise_high))
        return scheduler.time_at_lambda(lambda_)


KINDS = ("uniform", "warped", "log_snr", "polynomial")
UNIFORM = Grid()


def warped_grids(p: list[float], q: list[float]) -> list[Grid]:
    """Every warped grid of the product p x q, the search that each baseline is given."""
    return [Grid("warped", p_, q_) for p_ in p for q_ in q]
