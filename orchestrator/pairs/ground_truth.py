"""Ground truth: adaptive RK45 from noise to data. The only importer of torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor
from torchdiffeq import odeint

from solvers.field import CountingField, VelocityField


def largest_sample_rms(error: Tensor) -> Tensor:
    """The largest of the samples' RMS errors, 0-d.

    torchdiffeq's own norm averages over the whole batch, so that a difficult sample is solved more loosely the easier
    its neighbours are.
    """
    if error.ndim < 2:
        return error.abs().max()
    return error.flatten(1).square().mean(dim=1).sqrt().max()


def solve(velocity: VelocityField, x0: Tensor, rtol: float, atol: float) -> tuple[Tensor, int]:
    """x(t_max) from noise by dopri5, and the velocity evaluations it took.

    The state is float64 whatever the network computes in. The last step lands on t_max: a solver that oversteps and
    interpolates back would ask the network outside its domain.

    Args:
        velocity: The field; its scheduler gives the ends and the start's scale.
        x0: Noise ~ N(0, I), shape (B, ...).
        rtol, atol: Tolerances on the largest per-sample RMS error of a step.

    Returns:
        x1 of the shape of ``x0``, float64, and the NFE of the batch.

    Raises:
        FloatingPointError: The solution is not finite.
    """
    scheduler = velocity.scheduler
    ends = torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64, device=x0.device)
    counted = CountingField(velocity)
    start = float(scheduler.sigma(scheduler.t_min)) * x0.to(torch.float64)
    try:
        with torch.no_grad():
            states = odeint(
                lambda t, x: counted(x, t.cpu()),
                start,
                ends,
                rtol=rtol,
                atol=atol,
                method="dopri5",
                options={"norm": largest_sample_rms, "step_t": ends[1:]},
            )
    except AssertionError as error:  # torchdiffeq's word for steps that shrink to nothing
        raise FloatingPointError(
            f"ground truth broke off after {counted.nfe} evaluations ({error}): the velocity is not finite; check the "
            f"model, its data range and the guidance scale"
        ) from error
    x1 = states[-1]
    if not bool(torch.isfinite(x1).all()):
        lost = int((~torch.isfinite(x1).flatten(1).all(1)).sum())
        raise FloatingPointError(
            f"ground truth is not finite for {lost} of {len(x1)} samples; check the model, its "
            f"data range and the guidance scale"
        )
    return x1, counted.nfe
