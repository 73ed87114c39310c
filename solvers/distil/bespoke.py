"""Losses of Bespoke scale-time (BST) solvers that measure the error of each step from the ground-truth path.

Every step starts on the path itself, so no step depends on another, and gradients pass through one step only.
A velocity field takes one time per call, so the steps are evaluated one after the other, each on the whole batch.

Besides the m velocities of the solver, which need gradients, each loss evaluates n - 1 velocities without gradients:
the tangents of the path at its inner times, needed only if times are learned. The field's own weights are not learned:
freeze them (``requires_grad_(False)``). Otherwise the backward pass spends time on their gradients.

The loss that needs only the end of the path, BST eq. 6, is :func:`solvers.losses.rmse_loss`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from solvers.families._bespoke import ScaleTimeNodes
from solvers.field import VelocityField
from solvers.losses import counted, rmse_loss
from solvers.schedulers.base import Scheduler
from solvers.trajectory import DensePath


@runtime_checkable
class StepwiseFamily(Protocol):
    """A family whose steps can be taken one by one, from any state: ``bespoke_rk1`` and ``bespoke_rk2``.

    :class:`solvers.families._bespoke.BespokeRungeKutta` documents the members.
    """

    @property
    def stages(self) -> int: ...

    def transform(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> ScaleTimeNodes: ...

    def step(self, nodes: ScaleTimeNodes, i: int, x: Tensor, velocity: VelocityField) -> Tensor: ...

    def step_lipschitz(self, nodes: ScaleTimeNodes, lipschitz: float) -> Tensor: ...


def rmse_bound_loss(
    family: StepwiseFamily,
    parameters: Tensor,
    sigma0: float,
    field: VelocityField,
    path: DensePath,
    lipschitz: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """sum_i M_i d_i per sample (BST eq. 26, Algorithm 3); its mean over samples is minimised.

    d_i is the error of step i started on the path (eq. 24). M_i = L_i ... L_{n-1} bounds the factor by which the later
    steps amplify it (eq. 25, lemmas D.2 and D.3). The sum bounds the error ||x_n - x(1)|| of the whole solver if
    ``lipschitz`` is at least the Lipschitz constant of u; 1, as in the paper, is a heuristic.

    Errors are measured on the original path, with sigma0 too: it only adds a known transform to the learned one. On a
    path that starts at snr > 0, a sigma0 below 1 starts the solver off the path, and that first error is not counted.

    Args:
        family: A family whose steps can be taken one by one.
        parameters: Shape (p,), float64; the loss is differentiable in them.
        sigma0: Preconditioning that belongs to the parameters.
        field: The velocity on the original path, frozen.
        path: Ground truth of the batch, on the whole domain of ``field.scheduler``. The field is evaluated in the
            dtype and on the device of its states.
        lipschitz: L_tau, the assumed Lipschitz constant of u.
        mask: Which entries of a sample count, see :func:`solvers.losses.counted`.

    Returns:
        Shape (B,), float32 or better.

    Raises:
        ValueError: ``lipschitz`` is negative, the number of parameters does not correspond to any n, or the path does
            not cover the times.
    """
    if not lipschitz >= 0:
        raise ValueError(f"a Lipschitz constant must not be negative, got lipschitz={lipschitz}; the paper uses 1")
    nodes = family.transform(parameters, field.scheduler, sigma0)
    factors = family.step_lipschitz(nodes, lipschitz)
    weights = torch.cat([factors[1:], factors.new_ones(1)]).flip(0).cumprod(0).flip(0)
    errors = local_errors(family, nodes, field, path, mask)
    return weights.to(errors) @ errors


def lte_loss(
    family: StepwiseFamily,
    parameters: Tensor,
    sigma0: float,
    field: VelocityField,
    path: DensePath,
    mask: Tensor | None = None,
) -> Tensor:
    """sum_i d_i per sample, shape (B,): :func:`rmse_bound_loss` with every M_i = 1 (BST Algorithm 5)."""
    nodes = family.transform(parameters, field.scheduler, sigma0)
    return local_errors(family, nodes, field, path, mask).sum(dim=0)


def local_errors(
    family: StepwiseFamily, nodes: ScaleTimeNodes, field: VelocityField, path: DensePath, mask: Tensor | None = None
) -> Tensor:
    """d_i = ||x(t_i) - step_x(t_{i-1}, x(t_{i-1}))|| for i = 1..n (BST eq. 24), over the entries that count, (n, B)."""
    times = nodes.t[:: family.stages]
    states = path.state(times.detach())
    n = len(times) - 1
    if times.requires_grad and torch.is_grad_enabled():
        # The end times are fixed, so their tangents are not needed, and the last tangent may be infinite.
        inner = [x_aux(times[i], states[i], field) for i in range(1, n)]
    else:
        inner = list(states[1:n])
    on_path = [states[0], *inner, states[n]]
    steps = [family.step(nodes, i, on_path[i], field) for i in range(n)]
    return torch.stack([rmse_loss(counted(s, mask), counted(on_path[i + 1], mask)) for i, s in enumerate(steps)])


def x_aux(t: Tensor, state: Tensor, field: VelocityField) -> Tensor:
    """The path at a learned time (BST eq. 27): its value is x(t), its derivative in ``t`` is u_t(x(t)).

    No gradient flows into x(t) or u_t(x(t)).

    Args:
        t: 0-d float64.
        state: x(t), shape (B, ...).
        field: The velocity of the path.
    """
    fixed = t.detach()
    with torch.no_grad():
        tangent = field(state, fixed)
    return state.detach() + (t - fixed).to(state.dtype) * tangent
