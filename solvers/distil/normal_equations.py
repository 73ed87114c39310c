"""The normal equations of distillation: sums over pairs of J^T W J and J^T W r, without a backward pass.

theta has few entries and acts on the sample through n velocity evaluations, so the Jacobian of the sample is carried
forward along the solver itself. Write x_k = a_k x0 + sum_j b_kj u_j and u_k = u(x_k, t_k). An entry of row k (a_k,
b_k0.., t_k) changes nothing before u_k, so all columns share the velocities of the plain run, and

    du_k = D u(x_k, t_k)[direction],  direction x0 for a_k, u_j for b_kj, or d/dt for t_k;
    dx_j = sum_{i=k}^{j-1} b_ji du_i,  du_j = D u(x_j, t_j)[dx_j],  j = k+1..n-1;  column = sum_{i>=k} b_ni du_i.

The last row is linear: its columns are x0 and the u_j themselves. In total this takes n (n^2 + 6n - 1) / 6 evaluations
per pair (148 at n = 8, 936 at n = 16), while perturbing each entry separately takes n^2 (n + 5) / 2 (416 and 2688).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.distil.pair_field import PairField
from solvers.field import VelocityField
from solvers.losses import MSE_FLOOR, counted, psnr_loss
from solvers.ns import NSSolver

Jacobian = Literal["forward", "central", "jvp"]
"""Method of the directional derivatives of the velocity: forward or central differences, or forward-mode AD."""

MODEL_BATCH = 512
"""Default limit of samples per model call."""

SMALLEST_STATE = 1e-3
"""Lower limit of a state's size, as a share of the size of x0, in the choice of its difference step."""

TIME_SCALE = 1 / 8
"""Share of the domain over which a velocity is assumed to change as much as over the length of a state. It is below 1
because networks embed time in sines of high frequency."""


@dataclass(frozen=True)
class NormalEquations:
    """Sums over pairs at one theta in flat form, with P = n(n+5)/2 + 1 entries.

    Attributes:
        h: Gauss-Newton matrix of the summed loss, (P, P), float64, symmetric and positive semidefinite.
        g: Gradient of the summed loss, (P,), float64.
        loss: Summed loss, log ||r_s||^2 per pair.
        count: Number of pairs.
    """

    h: Tensor
    g: Tensor
    loss: float
    count: int


def total(parts: Sequence[NormalEquations]) -> NormalEquations:
    """The sums over several sets of pairs, added in the order of ``parts``.

    Raises:
        ValueError: ``parts`` is empty.
    """
    if not parts:
        raise ValueError("no normal equations to add up; request at least one pair")
    h, g = torch.zeros_like(parts[0].h), torch.zeros_like(parts[0].g)
    for part in parts:
        h += part.h
        g += part.g
    return NormalEquations(h, g, sum(part.loss for part in parts), sum(part.count for part in parts))


def learnable_entries(nfe: int) -> Tensor:
    """Mask over flat theta, (P,), bool: all entries except t_0 and a_0, which are fixed by the start of sampling."""
    free = torch.ones(nfe * (nfe + 5) // 2 + 1, dtype=torch.bool)
    free[0] = free[nfe] = False
    return free


def evaluations_per_pair(nfe: int, jacobian: Jacobian, free: Tensor | None = None) -> int:
    """Velocity evaluations that :func:`normal_equations` spends per pair, including the plain run.

    A forward-mode derivative counts as one evaluation; it costs about two.
    """
    free = learnable_entries(nfe) if free is None else free
    columns = sum((nfe - k) * len(_columns(nfe, k, free)) for k in range(nfe))
    return nfe + columns * (2 if jacobian == "central" else 1)


@torch.no_grad()
def normal_equations(
    solver: NSSolver,
    pair_field: PairField,
    x0: Tensor,
    x1: Tensor,
    *,
    memory_bytes: int,
    jacobian: Jacobian = "forward",
    free: Tensor | None = None,
    model_batch: int = MODEL_BATCH,
    precision: torch.dtype | None = None,
    mask: Tensor | None = None,
) -> NormalEquations:
    """J^T W J and J^T W r of the PSNR loss (BNS eq. 13, with the sign corrected) at ``solver``, summed over the pairs.

    With r_s = x_n - x1 and m_s = ||r_s||^2 = |r_s|^2 / d, the gradient of sum_s log m_s is
    sum_s (2 / (d m_s)) J_s^T r_s, which is ``g``. Its Hessian is sum_s (2 / (d m_s)) J_s^T J_s, which is ``h``, minus
    the rank-one term (2 / (d m_s))^2 (J_s^T r_s)(J_s^T r_s)^T, plus second derivatives of the sample. Omitting
    both gives iteratively reweighted least squares with weights 1/||r_s||. Since log is concave, the weighted squares
    bound the loss from above and touch it at theta. A pair that is exact (m_s at the loss's floor) has weight zero.

    Difference steps: a step along a direction v moves a state x by eta max(||x||, 1e-3 ||x0||), with norms per sample,
    so h = eta max(...) / ||v||; a step in time is eta (t_max - t_min) / 8, and stays in the domain. With eps the
    rounding unit of ``precision``, eta = sqrt(eps) forward, eps^(1/3) central: errors of order eta and eta^2.
    Measured on the digits model at NFE 8 against 'jvp' in float64, as a share of the norm of H (of g): float64
    forward 8e-8 (8e-8), central 1e-9 (2e-10); float32 forward 2e-3 (2e-3), central 8e-4 (1e-4), jvp 2e-6 (6e-7).

    Args:
        solver: theta; its ``times``, ``a`` and ``b`` are not differentiated.
        pair_field: Returns the velocity field for any rows of ``x0``.
        x0: Noise, (B, ...).
        x1: Ground truth, same shape.
        memory_bytes: Memory limit of the tensors held here: the Jacobian, states, velocities, inputs and outputs of
            the model. The model's own activations are not included; ``model_batch`` bounds them. Pairs are processed
            in batches that fit, and a pair's columns too if necessary; this changes results by rounding only.
        jacobian: 'forward' and 'central' differences need only the model's output. 'jvp' is exact and needs a model
            that torch's forward-mode AD can differentiate, in the state and in t.
        free: Mask over flat theta, (P,), bool: the entries whose columns are computed. The rows and columns of the
            other entries in ``h`` and ``g`` are zero. Default: all except t_0 and a_0.
        model_batch: Maximum number of samples per model call.
        precision: dtype in which the model computes, if it is coarser than that of ``x0``.
        mask: Which entries of a sample count, see :func:`solvers.losses.counted`.

    Raises:
        ValueError: Shapes differ, the mask or an option is invalid, the memory is too small for one pair, or the model
            cannot be differentiated by 'jvp'.
    """
    if x0.shape != x1.shape or x0.ndim < 2 or len(x0) == 0:
        raise ValueError(
            f"x0 and x1 must have one shape (B, ...) with B >= 1, got {tuple(x0.shape)} and {tuple(x1.shape)}"
        )
    if jacobian not in get_args(Jacobian):
        raise ValueError(f"unknown jacobian {jacobian!r}; choose one of {', '.join(get_args(Jacobian))}")
    size = len(solver.flat())
    free = learnable_entries(solver.nfe) if free is None else free
    if free.shape != (size,) or free.dtype != torch.bool:
        raise ValueError(
            f"'free' must be a mask over the {size} numbers of theta (NFE {solver.nfe}), got "
            f"{tuple(free.shape)} {free.dtype}"
        )
    unit = _Unit.plan(solver.nfe, int(free.sum()), x0, memory_bytes, model_batch, jacobian)
    derivative = _Derivative(jacobian, precision or x0.dtype)
    h = torch.zeros(size, size, dtype=torch.float64)
    g = torch.zeros(size, dtype=torch.float64)
    loss = 0.0
    free_indices = free.nonzero().squeeze(1)
    for first in range(0, len(x0), unit.pairs):
        rows = torch.arange(first, min(first + unit.pairs, len(x0)))
        run = _Run(solver, pair_field, rows, x0[first : first + unit.pairs], derivative)
        columns = run.jacobian(free, unit.columns)
        kept = None if mask is None else mask[first : first + unit.pairs]
        sample, truth = (counted(x, kept) for x in (run.sample, x1[first : first + unit.pairs]))
        residual = (sample.to(torch.float64) - truth.to(torch.float64)).flatten(1)
        if kept is not None:
            factor = counted(torch.ones_like(x0[: len(kept)]), kept).flatten(1).to(columns.dtype)
            columns.masked_fill_(factor == 0, 0.0).mul_(factor)
        part_h, part_g = _weighted_products(columns, residual, unit.block)
        h[free_indices[:, None], free_indices] += part_h
        g[free_indices] += part_g
        loss += float(psnr_loss(sample, truth).to(torch.float64).sum())
        del columns, run  # free them before the next batch is allocated
    return NormalEquations(h, g, loss, len(x0))


def _weighted_products(columns: Tensor, residual: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """sum_s w_s J_s^T J_s and sum_s w_s J_s^T r_s on the CPU, float64; columns (P, m, D), residual (m, D)."""
    mse = residual.square().mean(dim=1)
    weight = torch.where(mse > MSE_FLOOR, 2 / (residual.shape[1] * mse), 0.0).sqrt()
    residual = (weight[:, None] * residual).flatten()
    columns.mul_(weight.to(columns.dtype)[:, None])
    flat = columns.view(len(columns), -1)
    h = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=columns.device)
    g = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    for first in range(0, flat.shape[1], block):
        piece = flat[:, first : first + block].to(torch.float64)
        h.addmm_(piece, piece.T)
        g.addmv_(piece, residual[first : first + block])
    # Rounding may leave the product slightly unsymmetric, so it is symmetrised.
    return ((h + h.T) / 2).cpu(), g.cpu()


# ---- batch sizes from the memory limit ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Sizes of the work units: pairs, columns of one row of theta, and elements per block of a float64 product."""

    pairs: int
    columns: int
    block: int

    @classmethod
    def plan(cls, nfe: int, free: int, x0: Tensor, memory_bytes: int, model_batch: int, jacobian: Jacobian) -> _Unit:
        """The largest units that ``memory_bytes`` and ``model_batch`` allow.

        Raises:
            ValueError: One pair with one column does not fit in memory, or one direction does not fit in a model call.
        """
        dimensions = x0[0].numel()
        state, tangent = x0.element_size(), _tangent_dtype(x0).itemsize
        queries = 1 if jacobian == "forward" else 2
        # Inputs, velocities and the sample, plus the residual in float64 while it is computed.
        plain = dimensions * ((2 * nfe + 3) * state + 5 * 8)
        # The directions and their sum, the tangents of every row, and the model's inputs and outputs during a call.
        column = dimensions * ((nfe + 3) * tangent + queries * (2 * state + 2 * tangent))
        jacobian_bytes = dimensions * free * tangent

        def needed(pairs: int, columns: int) -> int:
            return pairs * (plain + jacobian_bytes + columns * column)

        if needed(1, 1) > memory_bytes:
            raise ValueError(
                f"normal equations of NFE {nfe} at {dimensions} dimensions need {needed(1, 1):,} bytes for one pair "
                f"and one column, but memory_bytes is {memory_bytes:,}; raise it, or learn fewer evaluations"
            )
        if model_batch < queries:
            raise ValueError(f"model_batch must be at least {queries} for jacobian={jacobian!r}, got {model_batch}")
        most = nfe + 1
        pairs = max(1, min(memory_bytes // needed(1, most), model_batch // queries, len(x0)))
        room = memory_bytes // pairs - plain - jacobian_bytes
        columns = max(1, min(most, room // column, model_batch // (queries * pairs)))
        return cls(pairs, columns, max(1, min(65_536, pairs * columns * column // (8 * max(1, free)))))


# ---- one batch of pairs -------------------------------------------------------------------------------------------


class _Recorder:
    """A velocity field that records its input states and the velocities it returns."""

    def __init__(self, field: VelocityField):
        self.field = field
        self.scheduler = field.scheduler
        self.states: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        velocity = self.field(x, t)
        self.states.append(x)
        self.velocities.append(velocity)
        return velocity


class _Run:
    """The plain run of theta on a batch of m pairs, and the Jacobian carried forward along it."""

    def __init__(self, solver: NSSolver, pair_field: PairField, rows: Tensor, x0: Tensor, derivative: _Derivative):
        recorder = _Recorder(pair_field(rows))
        self.x0 = x0
        self.sample = solver.sample(recorder, x0)
        self.states, self.velocities = recorder.states, recorder.velocities
        self.times = solver.times
        self.b = solver.b.tolist()
        self.nfe = solver.nfe
        self.pair_field = pair_field
        self.rows = rows
        self.derivative = derivative
        self.dtype = _tangent_dtype(x0)
        self.smallest = SMALLEST_STATE * _rms(x0.to(self.dtype), first=1)

    def jacobian(self, free: Tensor, at_once: int) -> Tensor:
        """Columns of the free entries in flat order, (P_free, m, D); up to ``at_once`` columns share a model call."""
        position = (free.cumsum(0) - 1).tolist()
        columns = torch.empty(int(free.sum()), *self.x0.shape, dtype=self.dtype, device=self.x0.device)
        for k in range(self.nfe):
            for chunk in _balanced(_columns(self.nfe, k, free), at_once):
                columns[[position[column.index] for column in chunk]] = self._carry(k, chunk)
        for column in _columns(self.nfe, self.nfe, free):
            columns[position[column.index]] = self._direction(column)
        return columns.flatten(2)

    def _direction(self, column: _Column) -> Tensor:
        """dx_k / d(entry) for an entry of row k other than its time."""
        source = self.x0 if column.source == "x0" else self.velocities[int(column.source)]
        return source.to(self.dtype)

    def _carry(self, k: int, chunk: list[_Column]) -> Tensor:
        """d x_n for these entries of row k, (c, m, ...)."""
        tangents = torch.empty(self.nfe - k, len(chunk), *self.x0.shape, dtype=self.dtype, device=self.x0.device)
        moved = [column for column in chunk if column.source != "t"]
        if moved:
            directions = torch.stack([self._direction(column) for column in moved])
            tangents[0, : len(moved)] = self._along(k, directions)
        if len(moved) < len(chunk):  # t_k is the last entry of its row
            field = self.pair_field(self.rows)
            tangents[0, -1] = self.derivative.in_time(field, self.states[k], self.times[k], self.velocities[k])
        for j in range(k + 1, self.nfe):
            tangents[j - k] = self._along(j, self._combined(j, k, tangents))
        return self._combined(self.nfe, k, tangents)

    def _combined(self, j: int, k: int, tangents: Tensor) -> Tensor:
        """dx_j = sum_{i=k}^{j-1} b_ji du_i."""
        combined = torch.zeros_like(tangents[0])
        for i in range(k, j):
            if self.b[j][i]:
                combined.add_(tangents[i - k], alpha=self.b[j][i])
        return combined

    def _along(self, k: int, directions: Tensor) -> Tensor:
        """D u(x_k, t_k)[v] for each direction v, (c, m, ...)."""
        point = (self.states[k], self.times[k], self.velocities[k])
        size = torch.maximum(_rms(point[0].to(self.dtype), first=1), self.smallest)
        return self.derivative.along(self.pair_field, self.rows, point, size, directions)


@dataclass(frozen=True)
class _Column:
    """A column: the index of its entry in flat theta, and its source ('x0', the j of u_j, or 't' for a time)."""

    index: int
    source: str


def _columns(nfe: int, k: int, free: Tensor) -> list[_Column]:
    """The columns of the free entries of row k, with the time last."""
    first_b = 2 * nfe + 1 + k * (k - 1) // 2
    row = [_Column(nfe + k, "x0"), *(_Column(first_b + j, str(j)) for j in range(k))]
    if k < nfe:
        row.append(_Column(k, "t"))
    return [column for column in row if free[column.index]]


def _balanced(columns: list[_Column], at_once: int) -> Iterator[list[_Column]]:
    """Split ``columns`` into parts of at most ``at_once``, as few as possible and of about equal size."""
    if not columns:
        return
    parts = -(-len(columns) // at_once)
    size = -(-len(columns) // parts)
    for first in range(0, len(columns), size):
        yield columns[first : first + size]


# ---- directional derivatives of the velocity ----------------------------------------------------------------------


class _Derivative:
    """Directional derivatives of a velocity field, by one of the three :data:`Jacobian` methods."""

    def __init__(self, method: Jacobian, precision: torch.dtype):
        self.method = method
        epsilon = torch.finfo(precision).eps
        self.relative_step = epsilon ** (1 / 3) if method == "central" else math.sqrt(epsilon)

    def along(
        self,
        pair_field: PairField,
        rows: Tensor,
        point: tuple[Tensor, Tensor, Tensor],
        size: Tensor,
        directions: Tensor,
    ) -> Tensor:
        """D u(x, t)[v] for each direction v, (c, m, ...), in the directions' dtype.

        Args:
            pair_field, rows: The field of the pairs, and the m rows that x belongs to.
            point: x (m, ...), t, and the velocity u(x, t), which was computed before.
            size: Length of a step of relative size 1 at each x, (m, 1, ...).
            directions: v, (c, m, ...).
        """
        x, t, velocity = point
        count = len(directions)
        if self.method == "jvp":
            field = pair_field(rows.repeat(count))
            with forward_ad.dual_level():
                points = x.repeat(count, *(1,) * (x.ndim - 1))
                dual = forward_ad.make_dual(points, directions.flatten(0, 1).to(x.dtype))
                tangent = _tangent_of(lambda: field(dual, t), "the state")
            return tangent.view_as(directions).to(directions.dtype)
        length = _rms(directions, first=2)
        step = self.relative_step * size / length.clamp_min(torch.finfo(length.dtype).tiny)
        signs = (1.0,) if self.method == "forward" else (1.0, -1.0)
        points = torch.stack([torch.addcmul(x.to(step.dtype), step, directions, value=sign) for sign in signs])
        output = pair_field(rows.repeat(len(signs) * count))(points.flatten(0, 2).to(x.dtype), t)
        outputs = output.view_as(points).to(directions.dtype)
        difference = outputs[0] - (velocity if self.method == "forward" else outputs[1])
        # For a direction of length zero the step is undefined, and the derivative is zero.
        return torch.where(length > 0, difference.div_(step * len(signs)), 0.0)

    def in_time(self, field: VelocityField, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """du/dt at (x, t), with the shape of x, in the tangents' dtype; evaluates only in the scheduler's domain."""
        if self.method == "jvp":
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(t, torch.ones_like(t))
                return _tangent_of(lambda: field(x, dual), "t").to(_tangent_dtype(x))

        def at(offset: float) -> Tensor:
            return field(x, t + offset).to(_tangent_dtype(x))

        first, last = field.scheduler.t_min, field.scheduler.t_max
        step = self.relative_step * TIME_SCALE * (last - first)
        # The inward direction points to the farther end of the domain.
        inward = step if float(t) < (first + last) / 2 else -step
        if self.method == "forward":
            return (at(inward) - velocity).div_(inward)
        if min(float(t) - first, last - float(t)) > step:
            return (at(step) - at(-step)).div_(2 * step)
        # Near an end: the one-sided formula of second order, at the same cost.
        return (4 * at(inward) - at(2 * inward) - 3 * velocity).div_(2 * inward)


def _tangent_of(ask: Callable[[], Tensor], name: str) -> Tensor:
    """The derivative that forward-mode AD carries through ``ask``.

    Raises:
        ValueError: The model does not support forward-mode AD.
    """
    remedy = "use jacobian='central' or 'forward', which need only the model's output"
    try:
        tangent = forward_ad.unpack_dual(ask()).tangent
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"this model has no forward-mode derivative ({str(error).splitlines()[0]}); {remedy}"
        ) from error
    if tangent is None:
        raise ValueError(
            f"the velocity does not depend on {name} in a way that torch can differentiate (a detached tensor, a "
            f"Python number, or no dependence at all); {remedy}"
        )
    return tangent


def _tangent_dtype(x: Tensor) -> torch.dtype:
    """The dtype of tangents: float32 or better, because they are small differences and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _rms(x: Tensor, first: int) -> Tensor:
    """Root mean square over the dimensions from ``first`` on; these are kept with size 1."""
    return x.square().mean(dim=tuple(range(first, x.ndim)), keepdim=True).sqrt()
