"""Any fixed family, run on a scale-time transform of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from solvers.families._named import named_family
from solvers.families.base import Family
from solvers.field import VelocityField
from solvers.scale_time import Preconditioned, TransformedField, precondition
from solvers.schedulers._named import named_scheduler
from solvers.schedulers.base import Scheduler

GridOn = Literal["target", "source"]


@dataclass(frozen=True)
class ScaleTime(Family):
    """A family that steps along another scheduler's path: x-bar(r) = s_r x(t_r) (BST eq. 7; BNS eq. 6-8).

    The state is scaled to the target path, the inner family integrates the transformed field there, and the sample is
    scaled back. The network is unchanged; it is evaluated at x-bar/s and t_r.

    If the target path starts at a higher signal-to-noise ratio than the field's (edm from cond_ot), sampling starts
    later, from sigma-bar x0.

    Attributes:
        inner: Module name of a fixed family.
        inner_options: Its options.
        scheduler: Name of the target scheduler; by default the field's own.
        scheduler_options: Its options.
        sigma0: Scales the target's noise (BNS eq. 14), in addition to any preconditioning of the field.
        grid_on: Path on which the grid lies. 'target': times keep their relative positions, in the target's domain.
            'source': times stay on the field's own path and are mapped at equal signal-to-noise ratio, which suits
            grids defined by noise level (log_snr, polynomial, edm, ays).

    Raises:
        ValueError: Unknown family or scheduler, options that one of them rejects, or a transform without effect.
    """

    inner: str = "midpoint"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scheduler: str | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sigma0: float | None = None
    grid_on: GridOn = "target"
    source = "Shaul et al. 2023 (BST), eq. 7; Shaul et al. 2024 (BNS), eq. 6-8 and 14"

    def __post_init__(self) -> None:
        if self.sigma0 is None:
            # Without a scheduler the default is the papers' preconditioning, at its smallest published value.
            object.__setattr__(self, "sigma0", 2.0 if self.scheduler is None else 1.0)
        if not self._sigma0 > 0:
            raise ValueError(f"sigma0 must be positive, got {self.sigma0}")
        if self.scheduler is None and self._sigma0 == 1:
            raise ValueError("scale_time with sigma0=1 and no scheduler changes nothing; set one of them")
        if self.scheduler is None and self.scheduler_options:
            raise ValueError("scheduler_options belong to a scheduler of scale_time; name it as 'scheduler'")
        if self.grid_on not in get_args(GridOn):
            raise ValueError(f"grid_on must be one of {', '.join(get_args(GridOn))}, got {self.grid_on!r}")
        _ = self.inner_family, self._named_target

    @cached_property
    def inner_family(self) -> Family:
        """The family that is wrapped."""
        return named_family(self.inner, self.inner_options)

    @property
    def label(self) -> str:
        target = [self.scheduler] if self.scheduler else []
        if self._sigma0 != 1:
            target.append(f"sigma0={self._sigma0:g}")
        if self.scheduler_options:
            target.append(",".join(f"{name}={value}" for name, value in sorted(self.scheduler_options.items())))
        if self.grid_on == "source":
            target.append("grid on source")
        return f"ST {self.inner_family.label} ({', '.join(target)})"

    @property
    def order(self) -> int | None:
        return self.inner_family.order

    @property
    def evaluations_per_step(self) -> int:
        return self.inner_family.evaluations_per_step

    def steps(self, nfe: int) -> int:
        return self.inner_family.steps(nfe)

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        transformed = TransformedField(velocity, self._target(velocity.scheduler))
        r = self._times_on_target(times, velocity.scheduler, transformed)
        # The target's own start from the x0 in x = sigma x0, which equals s x if r[0] and times[0] have equal SNR.
        start = transformed.scheduler.sigma(r[0]) / velocity.scheduler.sigma(times[0])
        return transformed.restore(self.inner_family.integrate(transformed, start.to(x.dtype) * x, r))

    def _times_on_target(self, times: Tensor, source: Scheduler, transformed: TransformedField) -> Tensor:
        target = transformed.scheduler
        if self.grid_on == "target":
            share = (times - source.t_min) / (source.t_max - source.t_min)
            r = target.t_min + (target.t_max - target.t_min) * share
        else:
            r = target.time_at_angle(source.angle(times)).clamp(target.t_min, target.t_max)
        r = torch.cat([r[:-1], torch.full_like(r[-1:], target.t_max)])
        if not bool((r.diff() > 0).all()):
            stuck = int((r.diff() <= 0).nonzero()[0]) + 1
            raise ValueError(
                f"the grid's time {float(times[stuck].detach()):.6g} has a noise level that the path of the "
                f"{target.name} scheduler does not reach; use grid_on='target', or a grid that begins later"
            )
        return r

    def _target(self, source: Scheduler) -> Scheduler:
        if self._named_target is not None:
            return precondition(self._named_target, self._sigma0)
        if isinstance(source, Preconditioned):
            return precondition(source.base, source.sigma0 * self._sigma0)
        return precondition(source, self._sigma0)

    @property
    def _sigma0(self) -> float:
        assert self.sigma0 is not None
        return self.sigma0

    @cached_property
    def _named_target(self) -> Scheduler | None:
        return None if self.scheduler is None else named_scheduler(self.scheduler, self.scheduler_options)


FAMILY = ScaleTime
