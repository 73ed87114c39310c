"""Non-stationary (NS) solvers: theta in memory, and sampling by Algorithm 1 of the BNS paper.

This module is independent of the origin of theta: ``solvers.to_ns`` makes one from any linear solver,
``solvers.distil`` from data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

from solvers.field import VelocityField
from solvers.schedulers.base import Scheduler

MAX_NFE = 1000
"""Limit on n, far above any distilled solver, so that a hostile file cannot request unbounded memory."""


class InvalidThetaError(ValueError):
    """Raised for a theta that is malformed, or that does not belong to the model it is used on."""


@dataclass(frozen=True)
class NSSolver:
    """An n-step non-stationary solver, in which every state is a linear combination of x0 and past velocities.

        x_k = a_k x0 + sum_{j<k} b_kj u_j,   u_j = u_{t_j}(x_j),   k = 0..n,   sample = x_n

    (BNS eq. 11, Algorithm 1.) Row 0 is the first state, ``a_0 x0``. a_0 is 1 in the papers, and sigma(t_0) for solvers
    that start elsewhere, such as EDM's. Any Runge-Kutta, multistep, exponential or scale-time solver has this form.

    Attributes:
        times: Times t_0..t_{n-1} of the velocities, shape (n,), float64, in any order; repeats are allowed.
        a: Weights of x0, shape (n+1,), float64.
        b: Weights of the velocities, shape (n+1, n), float64, strictly lower triangular (b[k, j] = 0 for j >= k).
    """

    times: Tensor
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        n = self.nfe
        if self.times.ndim != 1 or n < 1 or self.a.shape != (n + 1,) or self.b.shape != (n + 1, n):
            raise InvalidThetaError(
                f"an NS solver of n={n} evaluations has times (n,), a (n+1,) and b (n+1, n); "
                f"got {tuple(self.times.shape)}, {tuple(self.a.shape)}, {tuple(self.b.shape)}"
            )
        if {self.times.dtype, self.a.dtype, self.b.dtype} != {torch.float64}:
            raise InvalidThetaError(
                f"times, a and b of an NS solver are float64, got {self.times.dtype}, {self.a.dtype}, {self.b.dtype}; "
                f"convert them with .double()"
            )
        if bool((self.b.detach().triu() != 0).any()):
            raise InvalidThetaError(
                "b of an NS solver must be strictly lower triangular: a state can use only the velocities before it"
            )

    @property
    def nfe(self) -> int:
        """Velocity evaluations per sample."""
        return self.times.shape[0]

    def sample(self, velocity: VelocityField, x0: Tensor, *, checkpoint: bool = False) -> Tensor:
        """The sample x_n by Algorithm 1, with the shape and dtype of ``x0``.

        Args:
            velocity: ``u(x, t)``, any callable of a batch and a 0-d float64 time.
            x0: Noise ~ N(0, I), shape (B, ...).
            checkpoint: Recompute velocities in the backward pass (:class:`CheckpointedField`); has no effect without
                gradients.

        Differentiable once in ``times``, ``a`` and ``b``; double backward is not supported. The backward pass holds n
        states and n velocities, plus the network's own activations.
        """
        for x in self.states(velocity, x0, checkpoint=checkpoint):
            sample = x
        return sample

    def states(self, velocity: VelocityField, x0: Tensor, *, checkpoint: bool = False) -> Iterator[Tensor]:
        """Yield x_0, ..., x_n, each with the shape and dtype of ``x0``; the velocity at t_k is evaluated at x_k.

        The arguments are those of :meth:`sample`.
        """
        needs_graph = torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad)
        field = CheckpointedField(velocity) if checkpoint else velocity
        a, b = self.a.tolist(), self.b.tolist()
        velocities: list[Tensor] = []
        for k in range(self.nfe + 1):
            if needs_graph:
                x: Tensor = _Combination.apply(self.a[k], self.b[k], x0, *velocities)
            else:
                x = _combine(a[k], b[k], x0, velocities)
            yield x
            if k < self.nfe:
                velocities.append(field(x, self.times[k]))

    def flat(self) -> Tensor:
        """All entries of theta in one float64 vector: times, a, then the lower triangle of b by rows."""
        rows, columns = lower_triangle(self.nfe)
        return torch.cat([self.times, self.a, self.b[rows, columns]])

    @classmethod
    def from_flat(cls, flat: Tensor) -> NSSolver:
        """The inverse of :meth:`flat`, differentiable.

        Raises:
            InvalidThetaError: The length does not correspond to any n.
        """
        n = nfe_of_flat(flat.shape[0])
        rows, columns = lower_triangle(n)
        b = torch.zeros(n + 1, n, dtype=flat.dtype).index_put((rows, columns), flat[2 * n + 1 :])
        return cls(times=flat[:n], a=flat[n : 2 * n + 1], b=b)

    def detach(self) -> NSSolver:
        """A copy of the solver without gradients."""
        return NSSolver(self.times.detach().clone(), self.a.detach().clone(), self.b.detach().clone())


def lower_triangle(nfe: int) -> tuple[Tensor, Tensor]:
    """Row and column indices of the free entries of b, by rows: (1,0), (2,0), (2,1), ..."""
    rows, columns = torch.tril_indices(nfe + 1, nfe, offset=-1)
    return rows, columns


def nfe_of_flat(length: int) -> int:
    """The n for which flat theta has ``length`` entries: n times, n+1 a, n(n+1)/2 b.

    Raises:
        InvalidThetaError: The length does not correspond to any n.
    """
    n = round((-5 + math.sqrt(25 + 8 * (length - 1))) / 2)
    if n < 1 or n * (n + 5) // 2 + 1 != length:
        raise InvalidThetaError(f"a theta cannot have {length} numbers: n evaluations have n(n+5)/2 + 1 of them")
    return n


class CheckpointedField:
    """A velocity field that keeps only its inputs for the backward pass, and is evaluated again there.

    This is activation checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost") with one
    segment per velocity. For its gradient a solver then holds n states, n velocities, and the activations of one
    evaluation at a time, at the cost of one more forward pass per evaluation. The gradient is the same.

    Args:
        field: A deterministic field: its second evaluation must equal the first. Evaluation counters count both.
    """

    def __init__(self, field: VelocityField):
        self.field = field

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the wrapped field."""
        return self.field.scheduler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), equal to the wrapped field."""
        if not torch.is_grad_enabled():
            return self.field(x, t)
        return recompute(self.field, x, t, use_reentrant=False, preserve_rng_state=False)


def _combine(a: float, b: list[float], x0: Tensor, velocities: Sequence[Tensor]) -> Tensor:
    """a x0 + sum_j b_j u_j, accumulated in place, without a stacked copy of the velocities."""
    x = x0 * a
    for weight, velocity in zip(b, velocities, strict=False):
        if weight:
            x.add_(velocity, alpha=weight)
    return x


class _Combination(torch.autograd.Function):
    """:func:`_combine` with gradients in a, b, x0 and the u_j. It keeps references to x0 and the u_j, not copies.

    Inputs: a (0-d), b (n,) of which the first entries are used, x0, and the velocities so far, with the shape of x0.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, x0: Tensor, *velocities: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, x0, *velocities)
        return _combine(float(a), b.tolist(), x0, velocities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Use plain tensors: ``to_ns`` may run the solver on a subclass that rejects nonlinear operations, such as the
        # products below.
        a, b, x0, *velocities = (saved.as_subclass(Tensor) for saved in ctx.saved_tensors)
        gradient = gradient.as_subclass(Tensor)
        # Sums over a whole batch are computed in float32 or better.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        needs_a, needs_b, *needs_terms = ctx.needs_input_grad
        a_gradient = (wide * x0).sum().to(a) if needs_a else None
        b_gradient = None
        if needs_b:
            b_gradient = torch.zeros_like(b)
            if velocities:
                b_gradient[: len(velocities)] = torch.stack([(wide * velocity).sum() for velocity in velocities]).to(b)
        weights = [float(a), *b.tolist()]
        terms = [
            gradient * weight if needed and weight else None
            for weight, needed in zip(weights, needs_terms, strict=False)
        ]
        return a_gradient, b_gradient, *terms
