"""Ground truth: adaptive RK45 from noise to data. The only module that imports torchdiffeq."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from orchestrator.errors import UserError
from solvers.field import CountingField, VelocityField
from solvers.trajectory import DensePath

FIRST_STEP = 1e-3
"""Length of the first step as a share of the domain.

The step that dopri5 estimates can jump over a bend of the velocity at the noise end, and its error estimate does not
notice: on epsilon-prediction VP digits, the first step at 1e-5 loses 1e-3 (benchmarks/bench_ground_truth.py).
"""

SAFETY = 0.7
"""Factor on the step length that would meet the tolerance exactly. With torchdiffeq's 0.9, errors of two models at one
tolerance differ by a factor of ten; with this, by two, for about a tenth more evaluations."""


def largest_sample_rms(error: Tensor) -> Tensor:
    """The largest of the samples' RMS errors, 0-d.

    torchdiffeq's own norm averages over the whole batch. With it, the error of a difficult sample would depend on how
    easy the other samples are.
    """
    if error.ndim < 2:
        return error.abs().max()
    return error.flatten(1).square().mean(dim=1).sqrt().max()


class NotFiniteError(UserError, FloatingPointError):
    """A velocity, or the solution of the ODE, is not finite."""


def check_first_velocity(velocity: Tensor, t: Tensor) -> None:
    """Refuse velocities (B, ...) of a network's first evaluation that are not finite.

    Raises:
        NotFiniteError: With the time, the number of samples and what to check.
    """
    if bad := _not_finite(velocity):
        raise NotFiniteError(
            f"the network's first evaluation, at t={float(t):g}, is not finite for {bad} of {len(velocity)} samples; "
            f"check its weights, the options that describe it (prediction, native_scheduler, time), its dtype "
            f"(float16 ends at 65504) and its conditioning"
        )


def _not_finite(values: Tensor) -> int:
    """Number of samples that are not finite."""
    return int((~torch.isfinite(values.flatten(1))).any(dim=1).sum())


class Solution(NamedTuple):
    """The solution for a batch.

    Attributes:
        x1: x(t_max), float64.
        nfe: Velocity evaluations of the batch.
        path: The accepted steps (K knots); None if they were not kept.
    """

    x1: Tensor
    nfe: int
    path: DensePath | None


class _Watched:
    """The velocity in the form that torchdiffeq calls. It can record the knots of the accepted steps.

    dopri5 evaluates the velocity at the end of each step as its last stage, so the velocity at a knot costs nothing.
    """

    def __init__(self, field: CountingField, keep: bool):
        self.field = field
        self.keep = keep
        self.t_max = field.scheduler.t_max
        self.last: tuple[Tensor, Tensor] | None = None
        self.finite: Tensor = torch.ones(0, dtype=torch.bool)
        self.knots: list[tuple[float, Tensor, Tensor]] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        # To choose its first step, torchdiffeq tries a time that lies beyond t_max if the initial velocity is tiny.
        velocity = self.field(x.clone(), t.cpu().clamp(max=self.t_max))  # a field may change its input in place
        if self.last is None:
            check_first_velocity(velocity, t)
            if self.keep:
                self.knots.append((float(t), x.float(), velocity.float()))
            self.finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.finite &= torch.isfinite(velocity.flatten(1)).all(dim=1)  # read after a failure only
        self.last = x, velocity
        return velocity

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if self.keep and self.last is not None:
            x, velocity = self.last
            self.knots.append((float(t0 + dt), x.float(), velocity.float()))

    def failure(self, error: AssertionError) -> NotFiniteError:
        """The reason for an underflow of the step size."""
        bad = int((~self.finite).sum())
        problem = f"is not finite for {bad} of {len(self.finite)} samples" if bad else "grows without bound or jumps"
        return NotFiniteError(
            f"ground truth fails after {self.field.nfe} evaluations ({error}), because the velocity {problem}; check "
            f"the model, its data range and the guidance scale"
        )

    def path(self, t_max: float) -> DensePath:
        times, states, velocities = zip(*self.knots, strict=True)
        knots = torch.tensor([*times[:-1], t_max], dtype=torch.float64)
        return DensePath(
            knots.expand(len(states[0]), -1).clone(), torch.stack(states, dim=1), torch.stack(velocities, dim=1)
        )


def solve(
    velocity: VelocityField,
    x0: Tensor,
    rtol: float,
    atol: float,
    *,
    keep_path: bool = False,
    first_step: float | None = FIRST_STEP,
    safety: float = SAFETY,
) -> Solution:
    """Solve for x(t_max) from noise by dopri5.

    The state is float64, whatever the precision of the network. The last step ends exactly at t_max, since a solver
    that oversteps and interpolates back would evaluate the network outside its domain.

    Args:
        velocity: The field. Its scheduler defines t_min, t_max and the scale of the initial state.
        x0: Noise ~ N(0, I), shape (B, ...).
        rtol, atol: Tolerances on the largest per-sample RMS error of a step.
        keep_path: Whether to keep the accepted steps; their states and velocities are float32.
        first_step: Length of the first step as a share of the domain; None lets torchdiffeq estimate it.
        safety: Factor on the step length that dopri5 expects to meet the tolerance exactly.

    Raises:
        NotFiniteError: A velocity or the solution is not finite.
    """
    scheduler = velocity.scheduler
    ends = torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64, device=x0.device)
    counted = CountingField(velocity)
    watched = _Watched(counted, keep_path)
    start = float(scheduler.start(scheduler.t_min)) * x0.to(torch.float64)
    try:
        with torch.no_grad():
            states = odeint(
                watched,
                start,
                ends,
                rtol=rtol,
                atol=atol,
                method="dopri5",
                options={
                    "norm": largest_sample_rms,
                    "step_t": ends[1:],
                    "safety": safety,
                    "first_step": None if first_step is None else first_step * (ends[1] - ends[0]),
                },
            )
    except AssertionError as error:  # raised by torchdiffeq when the step size underflows
        raise watched.failure(error) from error
    x1 = states[-1]
    if bad := _not_finite(x1):
        raise NotFiniteError(
            f"ground truth is not finite for {bad} of {len(x1)} samples; check the model, its data range and the "
            f"guidance scale"
        )
    return Solution(x1, counted.nfe, watched.path(float(ends[1])) if keep_path else None)
