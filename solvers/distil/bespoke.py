"""The losses of Bespoke scale-time (BST) solvers that score each step where it stands on the ground-truth path.

Every step starts on the path itself, so no step waits for another one, and gradients pass through one step only.
A velocity field takes one time a call, so the steps are evaluated one after the other, each on the whole batch.

Besides the m velocities of the solver, with gradients, each loss asks for n - 1 without: the tangents of the path at
its inner times, needed only where times are learned. A field's own weights are not learned: freeze them
(``requires_grad_(False)``), or a backward pass spends time on them.

The loss that needs the end of the path alone, BST eq. 6, is :func:`solvers.losses.rmse_loss`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from solvers.families._bespoke import ScaleTimeNodes
from solvers.field import VelocityField
from solvers.losses import rmse_loss
from solvers.schedulers.base import Scheduler
from solvers.trajectory import DensePath


@runtime_checkable
class StepwiseFamily(Protocol):
    """A family whose steps can be taken one by one, from any state: ``bespoke_rk1`` and ``bespoke_rk2``.

    What each member means is said at :class:`solvers.families._bespoke.BespokeRungeKutta`.
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
) -> Tensor:
    """sum_i M_i d_i of each sample (BST eq. 26, Algorithm 3); its mean over samples is minimised.

    d_i is the error of step i where it starts on the path (eq. 24), M_i = L_i ... L_{n-1} what the later steps can
    make of it at most (eq. 25, lemmas D.2 and D.3). The sum bounds the error ||x_n - x(1)|| of the whole solver where
    ``lipschitz`` is no smaller than the Lipschitz constant of u; 1, as in the paper, is a heuristic.

    Errors are those of the original path also with sigma0, which only adds a known transform to the learned one. On
    a path that starts at snr > 0 a sigma0 below 1 starts the solver off the path, and that first error is not counted.

    Args:
        family: A family with single steps.
        parameters: Shape (p,), float64; the loss is differentiable in them.
        sigma0: Preconditioning that the parameters are for.
        field: The velocity on the original path, frozen.
        path: Ground truth of the batch, on the whole domain of ``field.scheduler``; its states' dtype and device are
            those that the field is given.
        lipschitz: L_tau, the Lipschitz constant that u is taken to have.

    Returns:
        Shape (B,), float32 or better.

    Raises:
        ValueError: ``lipschitz`` is negative, the parameters are those of no n, or the path does not cover the times.
    """
    if not lipschitz >= 0:
        raise ValueError(f"a Lipschitz constant is not negative, got lipschitz={lipschitz}; the paper takes 1")
    nodes = family.transform(parameters, field.scheduler, sigma0)
    factors = family.step_lipschitz(nodes, lipschitz)
    weights = torch.cat([factors[1:], factors.new_ones(1)]).flip(0).cumprod(0).flip(0)
    errors = local_errors(family, nodes, field, path)
    return weights.to(errors) @ errors


def lte_loss(
    family: StepwiseFamily, parameters: Tensor, sigma0: float, field: VelocityField, path: DensePath
) -> Tensor:
    """sum_i d_i of each sample, shape (B,): :func:`rmse_bound_loss` with every M_i = 1 (BST Algorithm 5)."""
    nodes = family.transform(parameters, field.scheduler, sigma0)
    return local_errors(family, nodes, field, path).sum(dim=0)


def local_errors(family: StepwiseFamily, nodes: ScaleTimeNodes, field: VelocityField, path: DensePath) -> Tensor:
    """d_i = ||x(t_i) - step_x(t_{i-1}, x(t_{i-1}))|| for i = 1..n (BST eq. 24), shape (n, B)."""
    times = nodes.t[:: family.stages]
    states = path.state(times.detach())
    n = len(times) - 1
    if times.requires_grad and torch.is_grad_enabled():
        # The ends do not move: their tangent is not needed, and the last may be infinite.
        inner = [x_aux(times[i], states[i], field) for i in range(1, n)]
    else:
        inner = list(states[1:n])
    on_path = [states[0], *inner, states[n]]
    return torch.stack([rmse_loss(family.step(nodes, i, on_path[i], field), on_path[i + 1]) for i in range(n)])


def x_aux(t: Tensor, state: Tensor, field: VelocityField) -> Tensor:
    """The path at a time that is learned (BST eq. 27): its value is x(t), its derivative in ``t`` is u_t(x(t)).

    No gradient flows into either of the two.

    Args:
        t: 0-d float64.
        state: x(t), shape (B, ...).
        field: The velocity of the path.
    """
    fixed = t.detach()
    with torch.no_grad():
        tangent = field(state, fixed)
    return state.detach() + (t - fixed).to(state.dtype) * tangent
