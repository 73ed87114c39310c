"""The greedy least-squares start: theta in closed form, row by row, from ground-truth trajectories.

The state x_k is linear in row k of theta, so for k = 1..n the row (a_k, b_k0..b_k,k-1) is the least-squares fit of
x(t_k) by x0 and the velocities u_0..u_{k-1}. These are evaluated at the solver's own states, so each row corrects the
errors of the rows before it. The times remain those of the grid. The fit takes n evaluations per pair and does not
iterate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.distil.linear_system import solve_symmetric
from solvers.distil.pair_field import PairField
from solvers.losses import counted
from solvers.ns import NSSolver

RIDGE = 1e-10
"""Default ridge, as a share of each diagonal entry of the normal equations. It is needed because the late velocities
of a fine grid are nearly collinear."""


@torch.no_grad()
def fit(
    pair_field: PairField,
    x0: Tensor,
    states_at_grid: Tensor,
    times: Tensor,
    *,
    batch_size: int = 512,
    ridge: float = RIDGE,
    mask: Tensor | None = None,
) -> NSSolver:
    """Fit an NS solver to trajectories greedily, on the times of a grid.

    Args:
        pair_field: Returns the velocity field for any rows of ``x0``.
        x0: Noise ~ N(0, I), shape (B, ...).
        states_at_grid: x(t_0)..x(t_n) of each pair, shape (n+1, B, ...).
        times: t_0..t_n, shape (n+1,), float64. t_0 is ``t_min`` of the field's scheduler, t_n the time of the sample.
        batch_size: Pairs per model call.
        ridge: Ridge added to each diagonal entry of the normal equations, as a share of the entry. The equations are
            summed in float64.
        mask: Which entries of a sample count, see :func:`solvers.losses.counted`.

    Returns:
        theta with a_0 the start of the scheduler at t_min, and times t_0..t_{n-1}.

    Raises:
        ValueError: Shapes do not match, an option is out of range, ``times`` do not begin at ``t_min``, or velocities
            or states are not finite.
    """
    _check(x0, states_at_grid, times, batch_size, ridge)
    n = len(times) - 1
    scheduler = pair_field(torch.arange(1)).scheduler
    if float(times[0]) != scheduler.t_min:
        raise ValueError(
            f"the grid begins at t={float(times[0]):.6g}, but sampling under the {scheduler.name} scheduler begins "
            f"at t={scheduler.t_min:.6g}; begin the grid there"
        )
    first = scheduler.start(scheduler.t_min)
    solver = NSSolver(
        times=times[:n].clone(),
        a=torch.cat([first.reshape(1), torch.zeros(n, dtype=torch.float64)]),
        b=torch.zeros(n + 1, n, dtype=torch.float64),
    )
    batches = [torch.arange(i, min(i + batch_size, len(x0))) for i in range(0, len(x0), batch_size)]
    basis = [x0]
    for k in range(1, n + 1):
        states = float(solver.a[k - 1]) * x0
        for j in range(k - 1):
            states = states.add_(basis[1 + j], alpha=float(solver.b[k - 1, j]))
        basis.append(torch.cat([pair_field(rows)(states[rows], solver.times[k - 1]) for rows in batches]))
        matrix, target = _normal_equations(basis, states_at_grid[k], batches, mask)
        if not bool(torch.isfinite(matrix).all() and torch.isfinite(target).all()):
            raise ValueError(
                f"the velocities at t={float(times[k - 1]):.6g} or the states at t={float(times[k]):.6g} are not "
                f"finite; check the model and the trajectories"
            )
        weights = _ridge_solution(matrix, target, ridge)
        solver.a[k], solver.b[k, :k] = weights[0], weights[1:]
    return solver


def _check(x0: Tensor, states: Tensor, times: Tensor, batch_size: int, ridge: float) -> None:
    if times.ndim != 1 or len(times) < 2 or times.dtype != torch.float64:
        raise ValueError(
            f"times must be t_0..t_n, shape (n+1,) in float64 with n >= 1, got {tuple(times.shape)} in {times.dtype}"
        )
    if states.shape != (len(times), *x0.shape):
        raise ValueError(
            f"states_at_grid must hold x at each of the {len(times)} times, shape {(len(times), *x0.shape)}, got "
            f"{tuple(states.shape)}"
        )
    if len(x0) == 0:
        raise ValueError("no pairs to fit; give at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}: the basis may be collinear")


def _normal_equations(
    basis: list[Tensor], target: Tensor, batches: list[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A^T A and A^T y over all pairs and entries that count, float64 on the CPU, summed over batches of pairs."""
    basis, target = [counted(column, mask) for column in basis], counted(target, mask)
    matrix = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    right = torch.zeros(len(basis), dtype=torch.float64)
    for rows in batches:
        columns = torch.stack([column[rows].to(torch.float64).flatten() for column in basis])
        matrix += (columns @ columns.T).cpu()
        right += (columns @ target[rows].to(torch.float64).flatten()).cpu()
    return matrix, right


def _ridge_solution(matrix: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(A^T A + ridge diag(A^T A))^-1 A^T y; the weight of a zero column is zero."""
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    damped = matrix / scale[:, None] / scale + ridge * torch.eye(len(scale), dtype=torch.float64)
    return solve_symmetric(damped, target / scale) / scale
