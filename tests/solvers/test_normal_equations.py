"""Normal equations of distillation: agreement with an explicit Jacobian, documented cost and memory, and precision."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import fine_rk4, mixture, noise, nonlinear_field, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solvers.distil.normal_equations import (
    Jacobian,
    NormalEquations,
    evaluations_per_pair,
    learnable_entries,
    normal_equations,
    total,
)
from solvers.distil.pair_field import PairField, unconditional
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.field import FunctionField, VelocityField
from solvers.grids import Grid
from solvers.losses import counted, psnr_loss
from solvers.ns import NSSolver
from solvers.schedulers import VP, CondOT

PLENTY = 2**30
FIELD = nonlinear_field(CondOT())
PAIRS, DIMENSIONS = 5, 3
X0 = noise(PAIRS, DIMENSIONS)
X1 = fine_rk4(FIELD, X0, 0.0, 1.0, steps=50) + 0.01 * noise(PAIRS, DIMENSIONS, seed=1)
SOLVER = GridSolver(AdamsBashforth(3), 4, Grid("warped", p=1.3, q=1.2)).to_ns(CondOT())
METHODS = ["forward", "central", "jvp"]


class RecordingField:
    """A field that records the batch size and the time of every call."""

    def __init__(self, field: VelocityField):
        self.field = field
        self.scheduler = field.scheduler
        self.batches: list[int] = []
        self.times: list[float] = []

    @property
    def evaluations(self) -> int:
        return sum(self.batches)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.times.append(float(t.detach()))
        return self.field(x, t)


def explicit(solver: NSSolver, field: VelocityField, x0: Tensor, x1: Tensor) -> NormalEquations:
    """Normal equations by autograd: the full Jacobian of the sample in float64, and the gradient of the loss."""
    theta = solver.flat().clone().requires_grad_()

    def sample(flat: Tensor) -> Tensor:
        return NSSolver.from_flat(flat).sample(field, x0)

    jacobian = torch.autograd.functional.jacobian(sample, theta)
    residual = sample(theta).detach() - x1
    weight = 2 / (residual.shape[1] * residual.square().mean(1))
    losses = psnr_loss(sample(theta), x1)
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    h = torch.einsum("s,sdp,sdq->pq", weight, jacobian, jacobian)
    return NormalEquations(h, gradient, float(losses.sum().detach()), len(x0))


def equations_for(
    solver: NSSolver = SOLVER, field: VelocityField = FIELD, x0: Tensor = X0, x1: Tensor = X1, **options: Any
) -> NormalEquations:
    """Normal equations of the test problem, with defaults for everything that a test does not vary."""
    return normal_equations(solver, unconditional(field), x0, x1, **({"memory_bytes": PLENTY} | options))


# --- Values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jacobian", "tolerance"), [("forward", 1e-6), ("central", 1e-9), ("jvp", 1e-13)])
@pytest.mark.parametrize("family", [AdamsBashforth(3), Euler(), Midpoint(), RK4()], ids=lambda family: family.label)
def test_normal_equations_match_an_explicit_jacobian(jacobian: Jacobian, tolerance: float, family: Family) -> None:
    """H and g by autograd through the whole solver; finite differences deviate by their documented orders.

    Propagating tangents from row to row is exact (jvp). RK4 and Midpoint have rows of zeros and RK4 has equal times.
    """
    solver = GridSolver(family, 4, Grid("warped", p=1.3, q=1.2)).to_ns(CondOT())
    all_free = torch.ones(len(solver.flat()), dtype=torch.bool)
    expected = explicit(solver, FIELD, X0, X1)
    equations = equations_for(solver, jacobian=jacobian, free=all_free)
    assert relative_error(equations.h, expected.h) < tolerance
    assert relative_error(equations.g, expected.g) < tolerance


def test_the_loss_is_the_sum_over_the_pairs() -> None:
    equations = equations_for()
    expected = float(psnr_loss(SOLVER.sample(FIELD, X0), X1).sum())
    assert (equations.loss, equations.count) == (pytest.approx(expected, rel=1e-14), PAIRS)


def test_the_entries_that_sampling_fixes_are_left_out_by_default() -> None:
    """t_0 and a_0 have zero rows unless requested; the other entries are unaffected."""
    free = learnable_entries(SOLVER.nfe)
    assert free.logical_not().nonzero().flatten().tolist() == [0, SOLVER.nfe]
    full, default = equations_for(free=torch.ones_like(free)), equations_for()
    assert not default.h[~free].any()
    assert not default.g[~free].any()
    assert relative_error(default.h[free][:, free], full.h[free][:, free]) < 1e-13


def test_a_mask_leaves_out_columns_and_their_evaluations() -> None:
    """With only the linear last row of theta free, nothing is evaluated beyond the plain run."""
    n = SOLVER.nfe
    free = torch.zeros(len(SOLVER.flat()), dtype=torch.bool)
    free[2 * n] = True
    free[-n:] = True
    recording = RecordingField(FIELD)
    equations = equations_for(field=recording, free=free)
    assert recording.evaluations == n * PAIRS == evaluations_per_pair(n, "forward", free) * PAIRS
    expected = explicit(SOLVER, FIELD, X0, X1)
    assert relative_error(equations.h[free][:, free], expected.h[free][:, free]) < 1e-12


def test_sums_over_parts_equal_the_sum_over_all_pairs() -> None:
    """This lets several hosts share the pairs."""
    parts = [equations_for(x0=X0[:2], x1=X1[:2], jacobian="jvp"), equations_for(x0=X0[2:], x1=X1[2:], jacobian="jvp")]
    full = equations_for(jacobian="jvp")
    summed = total(parts)
    assert relative_error(summed.h, full.h) < 1e-14
    assert relative_error(summed.g, full.g) < 1e-14
    assert (summed.loss, summed.count) == (pytest.approx(full.loss), full.count)


def test_an_empty_sum_is_rejected() -> None:
    with pytest.raises(ValueError, match="no normal equations to add up; request at least one pair"):
        total([])


def test_an_exact_pair_has_zero_weight() -> None:
    """Its weight 1/||r|| would be infinite, but the loss is at its floor there."""
    x1 = X1.clone()
    x1[2] = SOLVER.sample(FIELD, X0)[2]
    others = [0, 1, 3, 4]
    with_exact, without = (
        equations_for(x1=x1, jacobian="jvp"),
        equations_for(x0=X0[others], x1=x1[others], jacobian="jvp"),
    )
    assert relative_error(with_exact.h, without.h) < 1e-13
    assert relative_error(with_exact.g, without.g) < 1e-13


@pytest.mark.parametrize("jacobian", METHODS)
def test_each_pair_is_evaluated_with_its_own_conditioning(jacobian: Jacobian) -> None:
    """Perturbed copies of a pair keep its conditioning in every micro-batch."""
    shift = noise(PAIRS, DIMENSIONS, seed=2)

    def field_of(rows: Tensor) -> FunctionField:
        return FunctionField(lambda x, t: torch.sin(x + shift[rows]) * (1 + t), CondOT())

    expected = explicit(SOLVER, field_of(torch.arange(PAIRS)), X0, X1)
    equations = normal_equations(SOLVER, field_of, X0, X1, memory_bytes=4_000, jacobian=jacobian)
    free = learnable_entries(SOLVER.nfe)
    assert relative_error(equations.h[free][:, free], expected.h[free][:, free]) < 1e-6


# --- Cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nfe", "jacobian", "expected"),
    [(8, "forward", 148), (8, "jvp", 148), (8, "central", 288), (16, "forward", 936), (1, "forward", 1)],
)
def test_evaluations_per_pair_match_the_documented_cost(nfe: int, jacobian: Jacobian, expected: int) -> None:
    """n (n^2 + 6n - 1) / 6, including the plain run's n: row k has k + 2 entries and n - k steps after it.

    Perturbing each free entry from the start would take n^2 (n + 5) / 2: 416 at n = 8 and 2688 at 16.
    """
    recording = RecordingField(FIELD)
    equations_for(GridSolver(Euler(), nfe, Grid()).to_ns(CondOT()), recording, X0[:2], X1[:2], jacobian=jacobian)
    assert recording.evaluations == 2 * expected
    assert evaluations_per_pair(nfe, jacobian) == expected


@pytest.mark.parametrize("jacobian", METHODS)
def test_columns_of_a_row_share_model_calls(jacobian: Jacobian) -> None:
    """Row k of n takes n - k calls (plus one for its time), independently of its number of columns."""
    recording = RecordingField(FIELD)
    equations_for(field=recording, jacobian=jacobian)
    n = SOLVER.nfe
    times = n - 1 if jacobian != "central" else 2 * (n - 1)
    assert len(recording.batches) == n + times + sum(n - k for k in range(1, n))


class _LiveBytes(TorchDispatchMode):
    """Records the peak number of bytes held by tensors created under it, counting each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.holders: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_zerotensor():  # jvp's zeros have no storage
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self.holders:
            self.live += size
        self.holders[pointer] = self.holders.get(pointer, 0) + 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.live -= size


BIG = 4096
BIG_X0, BIG_X1 = noise(6, BIG).float(), noise(6, BIG, seed=1).float()
DECAY = FunctionField(lambda x, t: -x, CondOT())


@pytest.mark.parametrize("memory_bytes", [1_200_000, 3_000_000, 12_000_000])
@pytest.mark.parametrize("jacobian", METHODS)
def test_the_memory_budget_is_respected(memory_bytes: int, jacobian: Jacobian) -> None:
    """All tensors alive at once, model outputs included, stay within the budget, and a larger budget is used."""
    field = DECAY if jacobian != "jvp" else FunctionField(lambda x, t: -x * (1 + 0 * t).to(x.dtype), CondOT())
    # The budget does not cover small tensors: H itself, times and weights.
    allowance = 100_000
    with _LiveBytes() as memory:
        equations_for(SOLVER, field, BIG_X0, BIG_X1, memory_bytes=memory_bytes, jacobian=jacobian)
    assert memory.peak < memory_bytes + allowance
    assert memory.peak > 0.3 * min(memory_bytes, 6 * 1_000_000)


@pytest.mark.parametrize("options", [{"memory_bytes": 3_000}, {"memory_bytes": 8_000}, {"model_batch": 2}])
@pytest.mark.parametrize("jacobian", METHODS)
def test_the_batch_size_changes_only_rounding(jacobian: Jacobian, options: dict[str, int]) -> None:
    """Finite-difference steps depend only on the pair, so the rest of its batch does not matter."""
    recording, full = RecordingField(FIELD), equations_for(jacobian=jacobian)
    batched = equations_for(field=recording, jacobian=jacobian, **options)
    assert recording.batches[0] < PAIRS  # even the plain run is split into batches
    assert relative_error(batched.h, full.h) < 1e-6
    assert relative_error(batched.g, full.g) < 1e-6


def test_no_model_call_exceeds_model_batch() -> None:
    recording = RecordingField(FIELD)
    equations_for(field=recording, model_batch=7)
    assert max(recording.batches) <= 7


def test_a_budget_too_small_for_one_pair_is_rejected_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"NFE 4 at 3 dimensions need [\d,]+ bytes .* memory_bytes is 1,000; raise it"):
        equations_for(memory_bytes=1_000)


# --- Finite differences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "jacobian", "tolerance"),
    [
        (torch.float32, "forward", 5e-3),
        (torch.float32, "central", 5e-4),
        (torch.bfloat16, "central", 0.25),
        (torch.float16, "central", 0.1),
        (torch.float16, "forward", 0.2),
    ],
    ids=str,
)
def test_difference_steps_suit_the_precision_of_the_model(
    dtype: torch.dtype, jacobian: Jacobian, tolerance: float
) -> None:
    """For a low-precision model the error is about the square root of its precision (2/3 power if central)."""
    rough = FunctionField(lambda x, t: FIELD(x.to(dtype), t.to(dtype)).to(x.dtype), CondOT())
    exact = explicit(SOLVER, FIELD, X0, X1)
    free = learnable_entries(SOLVER.nfe)
    # X1 is far enough from the sample that rounding does not change the direction of the residual.
    equations = equations_for(field=rough, jacobian=jacobian, precision=dtype)
    assert relative_error(equations.h[free][:, free], exact.h[free][:, free]) < tolerance


def test_precision_prevents_steps_too_small_for_the_model() -> None:
    """For the same float16 model under float64 states, differences without ``precision`` are mostly noise."""
    rough = FunctionField(lambda x, t: FIELD(x.half(), t.half()).to(x.dtype), CondOT())
    exact = explicit(SOLVER, FIELD, X0, X1)
    free = learnable_entries(SOLVER.nfe)
    with_precision, without = (
        relative_error(equations_for(field=rough, precision=dtype).h[free][:, free], exact.h[free][:, free])
        for dtype in (torch.float16, None)
    )
    assert without > 3 * with_precision


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_difference_steps_follow_the_scale_of_the_states(scale: float) -> None:
    """The same problem in other units has the same H up to rounding, so latents need not have unit size."""
    scaled = FunctionField(lambda x, t: scale * FIELD(x / scale, t), CondOT())
    # a_0 = 1, so x0 has the same units as the states.
    x0, x1 = (scale * X0).float(), (scale * X1).float()
    equations, plain = equations_for(field=scaled, x0=x0, x1=x1), equations_for(x0=X0.float(), x1=X1.float())
    all_rows = torch.ones(len(plain.g), dtype=torch.bool)
    assert relative_error(equations.h[all_rows], plain.h[all_rows]) < 1e-2


@pytest.mark.parametrize("jacobian", ["forward", "central"])
def test_times_are_queried_only_inside_the_domain(jacobian: Jacobian) -> None:
    """At both ends and close to them the step in time goes inward."""
    times = torch.tensor([0.1, 0.9, 0.9 - 1e-9, 0.1 + 1e-9, 0.1], dtype=torch.float64)
    base = GridSolver(Euler(), 5, Grid()).to_ns(CondOT(t_min=0.1, t_max=0.9))
    solver = NSSolver(times, base.a, base.b)
    recording = RecordingField(nonlinear_field(CondOT(t_min=0.1, t_max=0.9)))
    equations = equations_for(solver, recording, jacobian=jacobian)
    assert 0.1 <= min(recording.times) <= max(recording.times) <= 0.9
    free = learnable_entries(5)
    expected = explicit(solver, FIELD, X0, X1)
    assert relative_error(equations.h[free][:, free], expected.h[free][:, free]) < 1e-6


def test_the_time_of_an_infinite_velocity_is_not_queried() -> None:
    """VP at its last learnable time, 1e-4 before the end: the scheduler would reject an outward step."""
    field = mixture().field(VP())

    def checked(x: Tensor, t: Tensor) -> Tensor:
        VP().check_velocity_time(t)
        return field(x, t)

    base = GridSolver(Euler(), 3, Grid()).to_ns(VP())
    solver = NSSolver(torch.tensor([0.0, 0.5, 1 - 1e-4], dtype=torch.float64), base.a, base.b)
    for jacobian in ("forward", "central"):
        equations = equations_for(
            solver, FunctionField(checked, VP()), noise(4, 2), noise(4, 2, seed=1), jacobian=jacobian
        )
        assert bool(torch.isfinite(equations.h).all())


def test_a_zero_velocity_gives_finite_normal_equations() -> None:
    """The relative step would be 0/0; its column is zero instead of NaN."""
    still = FunctionField(lambda x, t: torch.zeros_like(x), CondOT())
    equations = equations_for(field=still)
    assert bool(torch.isfinite(equations.h).all())


# --- Kinds of model ----------------------------------------------------------------------------------------------


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator).double())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + t)


def _no_grad(net: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x, t)

    return velocity


def _detached(net: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: torch.from_numpy(net(x.detach(), t.detach()).detach().numpy())


@pytest.mark.parametrize("jacobian", ["forward", "central"])
@pytest.mark.parametrize("wrap", [_no_grad, _detached, torch.jit.script], ids=["no_grad", "numpy", "torchscript"])
def test_finite_differences_need_only_the_output_of_the_model(wrap: Callable[..., Any], jacobian: Jacobian) -> None:
    """Compiled models, exported models and models under no_grad work, although backpropagation cannot use them."""
    net = _Net()
    solver_field = FunctionField(wrap(net), CondOT())
    expected = explicit(SOLVER, FunctionField(net, CondOT()), X0, X1)
    free = learnable_entries(SOLVER.nfe)
    equations = equations_for(field=solver_field, jacobian=jacobian)
    assert relative_error(equations.h[free][:, free], expected.h[free][:, free]) < 1e-6


def test_no_graph_is_built_and_no_gradient_is_left() -> None:
    """This holds even if the model's weights require gradients."""
    net = _Net()
    grads: list[bool] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        output = net(x, t)
        grads.append(output.requires_grad)
        return output

    equations_for(field=FunctionField(velocity, CondOT()))
    assert not any(grads)
    assert net.weight.grad is None


def test_jvp_works_under_no_grad() -> None:
    """Forward-mode differentiation does not need a graph."""
    net = _Net()
    expected = explicit(SOLVER, FunctionField(net, CondOT()), X0, X1)
    free = learnable_entries(SOLVER.nfe)
    equations = equations_for(field=FunctionField(_no_grad(net), CondOT()), jacobian="jvp")
    assert relative_error(equations.h[free][:, free], expected.h[free][:, free]) < 1e-12


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, t: _NoForwardMode.apply(x), r"this model has no forward-mode derivative \(.*\); use jacobian='ce"),
        (lambda x, t: x.detach() * t, "does not depend on the state in a way that torch can differentiate"),
        (lambda x, t: x * float(t.detach()), "does not depend on t in a way that torch can differentiate"),
    ],
    ids=["no-jvp", "detached-x", "number-t"],
)
def test_a_model_that_jvp_cannot_differentiate_is_rejected_with_a_remedy(
    function: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    """A derivative that is silently zero would be worse than an error."""
    with pytest.raises(ValueError, match=message):
        equations_for(field=FunctionField(function, CondOT()), jacobian="jvp")


# --- Rejected input and non-finite values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobian": "backward"}, "unknown jacobian 'backward'; choose one of forward, central, jvp"),
        ({"x1": X1[:2]}, r"x0 and x1 must have one shape .*, got \(5, 3\) and \(2, 3\)"),
        ({"x0": X0[:0], "x1": X1[:0]}, r"with B >= 1, got \(0, 3\)"),
        ({"free": torch.ones(3, dtype=torch.bool)}, r"mask over the 19 numbers of theta \(NFE 4\), got \(3,\)"),
        ({"model_batch": 0}, "model_batch must be at least 1 for jacobian='forward', got 0"),
        ({"model_batch": 1, "jacobian": "central"}, "model_batch must be at least 2 for jacobian='central', got 1"),
    ],
    ids=["jacobian", "shapes", "empty", "mask", "batch", "batch-central"],
)
def test_invalid_arguments_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equations_for(**options)


def test_non_finite_velocities_propagate_to_the_result() -> None:
    """A weight of zero must not hide them, because the caller has to notice."""
    broken = FunctionField(lambda x, t: torch.full_like(x, math.nan), CondOT())
    equations = equations_for(field=broken)
    assert math.isnan(equations.loss)
    assert bool(equations.g.isnan().any())


def test_unconditional_gives_every_batch_the_same_field() -> None:
    """``unconditional`` turns a field into a pair field."""
    pair_field: PairField = unconditional(FIELD)
    assert pair_field(torch.arange(2)) is pair_field(torch.tensor([1, 1, 0])) is FIELD


def test_a_mask_leaves_entries_out_of_both_sides() -> None:
    """g is the gradient of the masked loss, and infinite ground truth where nothing counts changes nothing."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    truth = torch.where(mask, X1, torch.inf)
    measured = normal_equations(
        SOLVER, unconditional(FIELD), X0, truth, memory_bytes=PLENTY, jacobian="jvp", mask=mask, model_batch=6
    )
    flat = SOLVER.flat().requires_grad_(True)
    sample = NSSolver.from_flat(flat).sample(FIELD, X0)
    loss = psnr_loss(counted(sample, mask), counted(truth, mask)).sum()
    (gradient,) = torch.autograd.grad(loss, flat)
    free = learnable_entries(SOLVER.nfe)
    torch.testing.assert_close(measured.g[free], gradient[free], rtol=1e-6, atol=1e-8)
    assert measured.loss == pytest.approx(float(loss.detach()))
    whole = normal_equations(SOLVER, unconditional(FIELD), X0, X1, memory_bytes=PLENTY, jacobian="jvp")
    assert relative_error(measured.h, whole.h) > 0.01
