"""Ground truth: adaptive RK45 from noise to data. The only module that imports torchdiffeq."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from orchestrator.errors import StoreError, UserError
from solvers.families.adams_bashforth import variable_step_weights
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

ERROR_WEIGHTS = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
"""Weights of the seven velocities of a step of dopri5 in the estimate of its error (Shampine)."""

ORDER = 4
"""Order of the multistep method on given steps. At equal error, 3 and 5 take more evaluations on digits; on photographs
5 takes fewer (benchmarks/bench_shared_steps.py)."""


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
        errors: End of each accepted step, and its estimated error, relative to 1 + |x|, of its worst sample; None if
            not kept.
    """

    x1: Tensor
    nfe: int
    path: DensePath | None
    errors: tuple[tuple[float, float], ...] | None = None


class _Watched:
    """The velocity in the form that torchdiffeq calls. It can record the knots of the accepted steps.

    dopri5 evaluates the velocity at the end of each step as its last stage, so the velocity at a knot costs nothing.
    """

    def __init__(self, field: CountingField, keep: bool, keep_errors: bool):
        self.field = field
        self.keep = keep
        self.errors: list[tuple[float, float]] | None = [] if keep_errors else None
        self.stages: deque[Tensor] = deque(maxlen=6)
        self.begin: Tensor | None = None
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
            self.begin = velocity
            self.finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.finite &= torch.isfinite(velocity.flatten(1)).all(dim=1)  # read after a failure only
        self.last = x, velocity
        if self.errors is not None:
            self.stages.append(velocity)
        return velocity

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if self.last is None or self.begin is None:
            return
        x, velocity = self.last
        if self.keep:
            self.knots.append((float(t0 + dt), x.float(), velocity.float()))
        if self.errors is not None:
            stages = zip(ERROR_WEIGHTS, (self.begin, *self.stages), strict=True)
            error = float(dt) * sum((weight * stage.double() for weight, stage in stages), torch.zeros_like(x))
            size = largest_sample_rms(error / (1 + torch.maximum(y0.abs(), x.abs())))
            self.errors.append((float(t0 + dt), float(size)))
            self.begin = velocity

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
    keep_errors: bool = False,
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
        keep_errors: Whether to keep the ends of the accepted steps, and their estimated errors.
        first_step: Length of the first step as a share of the domain; None lets torchdiffeq estimate it.
        safety: Factor on the step length that dopri5 expects to meet the tolerance exactly.

    Raises:
        NotFiniteError: A velocity or the solution is not finite.
    """
    scheduler = velocity.scheduler
    ends = torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64, device=x0.device)
    counted = CountingField(velocity)
    watched = _Watched(counted, keep_path, keep_errors)
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
    x1 = _finite(states[-1])
    path = watched.path(float(ends[1])) if keep_path else None
    return Solution(x1, counted.nfe, path, None if watched.errors is None else tuple(watched.errors))


def solve_on_steps(velocity: VelocityField, x0: Tensor, times: Sequence[float], *, keep_path: bool = False) -> Solution:
    """Solve for x(t_max) from noise by variable-step Adams-Bashforth of order 4 on given steps.

    Each step takes one evaluation, without error control; a path takes one more at the end. The first three steps have
    lower order. The state is float64; the field takes and returns float32. Besides the state, four velocities are held.

    Args:
        velocity: The field.
        x0: Noise ~ N(0, I), shape (B, ...).
        times: t_0..t_n, from the field's t_min to its t_max.
        keep_path: Whether to keep the steps; their states and velocities are float32.

    Raises:
        StoreError: The times do not begin at t_min, or do not end at t_max.
        NotFiniteError: A velocity or the solution is not finite.
    """
    scheduler = velocity.scheduler
    if (times[0], times[-1]) != (scheduler.t_min, scheduler.t_max):
        raise StoreError(
            f"the steps of these pairs run from {times[0]:g} to {times[-1]:g}, but the model's path runs from "
            f"{scheduler.t_min:g} to {scheduler.t_max:g}"
        )
    knots = torch.tensor(times, dtype=torch.float64)
    velocities: deque[Tensor] = deque(maxlen=ORDER)
    states: list[Tensor] = []
    slopes: list[Tensor] = []
    with torch.no_grad():
        x = float(scheduler.start(scheduler.t_min)) * x0.to(torch.float64)
        for i, t in enumerate(knots if keep_path else knots[:-1]):
            state = x.to(torch.float32)
            if keep_path:
                states.append(state.clone())  # a field may change its input in place
            velocities.appendleft(velocity(state, t))
            if i == 0:
                check_first_velocity(velocities[0], t)
            if keep_path:
                slopes.append(velocities[0].float())
            if i < len(knots) - 1:
                nodes = knots[i + 1 - len(velocities) : i + 1].flip(0)
                weights = variable_step_weights(nodes, t, knots[i + 1]).tolist()
                step = weights[0] * velocities[0]
                for weight, past in zip(weights[1:], list(velocities)[1:], strict=True):
                    step.add_(past, alpha=weight)
                x.add_(step)
    x1 = _finite(x)
    if not keep_path:
        return Solution(x1, len(knots) - 1, None)
    path = DensePath(knots.expand(len(x), -1).clone(), torch.stack(states, dim=1), torch.stack(slopes, dim=1))
    return Solution(x1, len(knots), path)


def halved(steps: Sequence[float]) -> tuple[float, ...]:
    """Each step split in two: a sixteenth of the error, by the order."""
    middles = [(begin + end) / 2 for begin, end in pairwise(steps)]
    return (*(time for pair in zip(steps[:-1], middles, strict=True) for time in pair), steps[-1])


def _finite(x1: Tensor) -> Tensor:
    """The solution, if it is finite."""
    if bad := _not_finite(x1):
        raise NotFiniteError(
            f"ground truth is not finite for {bad} of {len(x1)} samples; check the model, its data range and the "
            f"guidance scale"
        )
    return x1
