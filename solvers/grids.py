"""Time grids, the times of a solver's steps. Each maps (steps, scheduler) to times t_0 < ... < t_n."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from solvers.schedulers.base import TIME_TOLERANCE, Scheduler

LOG_SNR_MARGIN = 1e-3
"""Margin of a log-SNR grid at an end with infinite log-SNR, as a share of the domain; the outermost step spans it."""

SD3_LEVELS = 1000
"""Noise levels that SD3 was trained on; its grids end at the least of them before they go on to the data."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "warped": ("p", "q"),
    "log_snr": (),
    "polynomial": ("rho",),
    "edm": ("rho", "sigma_min", "sigma_max"),
    "shifted": ("shift",),
    "sd3": ("shift",),
    "given": ("listed",),
    "ays": ("table",),
}
"""The options of each kind of grid."""

KINDS = tuple(OPTIONS)

AYS_TABLES: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise levels sigma/alpha of the optimised 10-step grids for Stable Diffusion 1.5, SDXL, DeepFloyd-IF stage 1 and
Stable Video Diffusion (Sabour et al. 2024, "Align Your Steps", appendix B)."""

AYS_ROUNDING = 0.02
"""Relative rounding error of the published tables; their last entries have only one or two digits."""


@dataclass(frozen=True)
class Grid:
    """A named time grid, as plain data: ``Grid(**asdict(grid))`` is the same grid, even after a JSON round trip.

    Kinds defined by their times, scaled to the domain [t_min, t_max], with uniform r:

    - 'uniform': t = r.
    - 'warped': t = (1 - (1-r)^p)^q. p > 1 concentrates steps near the data, q > 1 near the noise.
    - 'shifted': t = r / (shift - (shift - 1) r). shift > 1 concentrates steps near the noise (Esser et al. 2024, eq.
      23, which is the same formula in the noise level 1 - t). It is the grid of FLUX's pipelines with shift = e^mu,
      where mu depends on the resolution.
    - 'sd3': the grid of SD3's pipelines (:func:`sd3_times`), whose last step is shorter than that of 'shifted'.
    - 'given': times listed by the user; the ends of the domain may be left out.

    Kinds defined by their noise levels sigma/alpha, so that they suit every scheduler:

    - 'log_snr': uniform in log-SNR. 'polynomial': uniform in (sigma/alpha)^(1/rho). Both lie exactly between the
      ends, as in the papers, if log-SNR is finite there. At an end with infinite log-SNR they begin or stop just inside
      it (LOG_SNR_MARGIN), and the outermost point is then moved to the end.
    - 'edm': EDM's sampler (Karras et al. 2022, eq. 5): n levels from sigma_max to sigma_min, uniform in the 1/rho-th
      power, then the path's end. Levels outside the path are cut off. The grid begins at ``t_min`` if the path starts
      with at most sigma_max, and later otherwise. If the path ends with sigma_min or more, its end is the last level.
    - 'ays': a published table of Align Your Steps, interpolated linearly in log noise level if the number of steps is
      not 10. Its first and last point are the path's own ends. If the path covers only part of the table's range, that
      part is divided.

    Attributes:
        kind: One of the above.
        p, q: Exponents of 'warped', positive.
        rho: Exponent of 'polynomial' and 'edm', positive. Larger values put more steps near the data.
        sigma_min, sigma_max: Noise levels of 'edm', in sigma/alpha.
        shift: The time shift of 'shifted' and 'sd3', positive; 3 in SD3.
        listed: The times of 'given', strictly increasing.
        table: The table of 'ays': sd15, sdxl, deepfloyd or svd.

    Raises:
        ValueError: The kind or table is unknown, a value is out of range, or an option does not belong to the kind.
    """

    kind: str = "uniform"
    p: float = 1.0
    q: float = 1.0
    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    shift: float = 3.0
    listed: tuple[float, ...] = ()
    table: str = "sd15"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown time grid {self.kind!r}; choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "listed", tuple(float(t) for t in self.listed))
        if not (self.p > 0 and self.q > 0):
            raise ValueError(f"grid exponents must be positive, got p={self.p}, q={self.q}")
        if not 0 < self.rho < math.inf:
            raise ValueError(f"a grid's rho must be positive and finite, got {self.rho}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"a grid needs 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            )
        if not 0 < self.shift < math.inf:
            raise ValueError(f"a grid's shift must be positive and finite, got {self.shift}")
        if self.table not in AYS_TABLES:
            raise ValueError(f"unknown table {self.table!r} of the 'ays' grid; choose one of {', '.join(AYS_TABLES)}")
        self._check_listed()
        for option in fields(self)[1:]:
            if option.name not in OPTIONS[self.kind] and getattr(self, option.name) != option.default:
                owners = " and ".join(repr(kind) for kind, options in OPTIONS.items() if option.name in options)
                raise ValueError(
                    f"{option.name} belongs to the {owners} grid, not to {self.kind!r}; leave it out or change the kind"
                )

    def _check_listed(self) -> None:
        if self.kind == "given" and not self.listed:
            raise ValueError("the 'given' grid needs times: set listed to the times between noise (0) and data (1)")
        for t, t_next in zip(self.listed, self.listed[1:], strict=False):
            if not t < t_next:
                raise ValueError(f"listed times must rise strictly, but {t:g} is followed by {t_next:g}")
        for t in self.listed:
            if not 0 <= t <= 1:
                raise ValueError(f"listed times must lie between 0 (noise) and 1 (data), got {t:g}")

    @property
    def label(self) -> str:
        """The kind and the options that differ from their defaults; grids with the same label are the same grid."""
        defaults = {option.name: option.default for option in fields(self)}
        # The exponents of a warped grid are always part of its label.
        names = [n for n in OPTIONS[self.kind] if self.kind == "warped" or getattr(self, n) != defaults[n]]
        return " ".join([self.kind, *(self._option_label(name) for name in names)])

    def _option_label(self, name: str) -> str:
        value = getattr(self, name)
        match name:
            case "table":
                return str(value)
            case "listed":
                return ",".join(f"{t:g}" for t in value)
        return f"{name}={value:g}"

    def times(self, steps: int, scheduler: Scheduler) -> Tensor:
        """Times of shape (steps + 1,), float64, strictly increasing, differentiable in p and q.

        They run from ``scheduler.t_min`` to ``scheduler.t_max`` exactly, except for 'edm', which may begin later.

        Raises:
            ValueError: ``steps`` is less than 1, the listed times do not make ``steps`` steps or leave the domain, or
                the grid and the path have no noise levels in common.
        """
        if steps < 1:
            raise ValueError(f"a time grid needs at least one step, got {steps}")
        first, last = scheduler.t_min, scheduler.t_max
        match self.kind:
            case "given":
                return self._given(steps, scheduler)
            case "edm":
                return self._edm(steps, scheduler)
            case "log_snr" | "polynomial":
                times = self._between_margins(_uniform(steps), scheduler)
            case "ays":
                times = self._ays(_uniform(steps), scheduler)
            case _:
                times = first + (last - first) * self._warp(_uniform(steps))
        times[0], times[-1] = first, last
        return times

    def _warp(self, r: Tensor) -> Tensor:
        match self.kind:
            case "warped":
                return (1 - (1 - r) ** self.p) ** self.q
            case "shifted":
                return shift_times(r, self.shift)
            case "sd3":
                return sd3_times(r, self.shift)
        return r

    def _given(self, steps: int, scheduler: Scheduler) -> Tensor:
        times = list(self.listed)
        for t in (times[0], times[-1]):
            if not scheduler.t_min - TIME_TOLERANCE <= t <= scheduler.t_max + TIME_TOLERANCE:
                raise ValueError(
                    f"the listed time {t:g} is outside the domain [{scheduler.t_min:.6g}, {scheduler.t_max:.6g}] of "
                    f"the {scheduler.name} scheduler; its ends need not be listed"
                )
        inner = [t for t in times if scheduler.t_min + TIME_TOLERANCE < t < scheduler.t_max - TIME_TOLERANCE]
        if len(inner) + 1 != steps:
            raise ValueError(
                f"{len(inner)} listed times inside the domain make {len(inner) + 1} steps, but the solver takes "
                f"{steps}; list {steps - 1} times besides the ends, or change the NFE"
            )
        return torch.tensor([scheduler.t_min, *inner, scheduler.t_max], dtype=torch.float64)

    def _between_margins(self, r: Tensor, scheduler: Scheduler) -> Tensor:
        low, high = scheduler.lambda_(scheduler.t_min), scheduler.lambda_(scheduler.t_max)
        margin = LOG_SNR_MARGIN * (scheduler.t_max - scheduler.t_min)
        # ``times`` moves the outermost points to the ends.
        if not bool(torch.isfinite(low)):
            low = scheduler.lambda_(scheduler.t_min + margin)
        if not bool(torch.isfinite(high)):
            high = scheduler.lambda_(scheduler.t_max - margin)
        if self.kind == "log_snr":
            lambda_ = low + r * (high - low)
        else:
            noise_low, noise_high = torch.exp(-high / self.rho), torch.exp(-low / self.rho)
            lambda_ = -self.rho * torch.log(noise_high + r * (noise_low - noise_high))
        return scheduler.time_at_lambda(lambda_)

    def _edm(self, steps: int, scheduler: Scheduler) -> Tensor:
        high, low = self._shared_levels(scheduler, self.sigma_max, self.sigma_min, rounding=0.0)
        # 1e-6: if the path ends with exactly sigma_min, rounding must not cause a last step of length zero.
        path_continues = _noise_level(scheduler, scheduler.t_max) < self.sigma_min * (1 - 1e-6)
        r = _uniform(steps - 1) if path_continues else _uniform(steps)
        roots = high ** (1 / self.rho) + r * (low ** (1 / self.rho) - high ** (1 / self.rho))
        times = scheduler.time_at_lambda(-self.rho * torch.log(roots))
        if path_continues:
            times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        times[-1] = scheduler.t_max
        if _noise_level(scheduler, scheduler.t_min) <= self.sigma_max:
            times[0] = scheduler.t_min
        return times

    def _ays(self, r: Tensor, scheduler: Scheduler) -> Tensor:
        table = AYS_TABLES[self.table]
        high, low = self._shared_levels(scheduler, table[0], table[-1], rounding=AYS_ROUNDING)
        logs = -torch.tensor(table, dtype=torch.float64).log()
        positions = _uniform(len(table) - 1)
        begin, end = _interpolate(-torch.tensor([high, low], dtype=torch.float64).log(), logs, positions)
        return scheduler.time_at_lambda(_interpolate(begin + r * (end - begin), positions, logs))

    def _shared_levels(
        self, scheduler: Scheduler, sigma_max: float, sigma_min: float, rounding: float
    ) -> tuple[float, float]:
        """The highest and lowest noise level that the grid and the path have in common."""
        start, end = (_noise_level(scheduler, t) for t in (scheduler.t_min, scheduler.t_max))
        high = start if start < sigma_max * (1 - rounding) else sigma_max
        low = end if end > sigma_min * (1 + rounding) else sigma_min
        if not low < high:
            raise ValueError(
                f"the {self.label} grid has noise levels {sigma_min:g} to {sigma_max:g}, but the {scheduler.name} "
                f"scheduler's path goes from {start:.6g} to {end:.6g}; choose a grid with levels in between"
            )
        return high, low


def shift_times(r: Tensor, shift: float) -> Tensor:
    """r / (shift - (shift - 1) r) on [0, 1]: the time shift of flow models, with t = 1 - noise level; same shape."""
    return r / (shift - (shift - 1) * r)


def sd3_times(r: Tensor, shift: float) -> Tensor:
    """The grid of SD3's pipelines, FlowMatchEulerDiscreteScheduler with a static shift in diffusers.

    All points but the last are stretched to end at the least trained noise level, 1/1000, shifted. They are then
    shifted (so that level is shifted twice), and the last step goes on to the data.

    Args:
        r: Rising from 0 to 1, shape (n + 1,), float64; uniform in SD3.
        shift: Positive.
    """
    if len(r) > 2:
        least = shift_times(torch.tensor(1 - 1 / SD3_LEVELS, dtype=r.dtype), shift)
        r = torch.cat([r[:-1] / r[-2] * least, r[-1:]])
    return shift_times(r, shift)


def _uniform(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _noise_level(scheduler: Scheduler, t: float) -> float:
    """sigma/alpha, infinite for pure noise."""
    return float(torch.exp(-scheduler.lambda_(t)))


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys) at ``x``; ``xs`` rises strictly."""
    segment = (torch.searchsorted(xs, x, right=True) - 1).clamp(0, len(xs) - 2)
    share = (x - xs[segment]) / (xs[segment + 1] - xs[segment])
    return ys[segment] + share * (ys[segment + 1] - ys[segment])


UNIFORM = Grid()


def warped_grids(p: list[float], q: list[float]) -> list[Grid]:
    """All warped grids of the product p x q, over which each baseline is searched."""
    return [Grid("warped", p_, q_) for p_ in p for q_ in q]
