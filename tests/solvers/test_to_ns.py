"""Theorem 3.2: every family is a non-stationary solver, and the map to (T, a, b) is exact and differentiable."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import (
    affordable_nfe,
    central_difference,
    fixed_families,
    learnable_starts,
    noise,
    nonlinear_field,
    relative_error,
)
from torch import Tensor

from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family, GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.field import VelocityField
from solvers.grids import UNIFORM, Grid
from solvers.schedulers import VP, CondOT, Cosine, DiscreteVP, Scheduler
from solvers.to_ns import to_ns

# A nonlinear field and eight steps amplify the rounding of the last bit; the map itself is exact.
TO_ROUNDING = 2e-11


def _queries_the_data_end(solver: GridSolver) -> bool:
    """Whether the solver evaluates at t_max, determined by tracing it on CondOT, where that is allowed."""
    return float(solver.to_ns(CondOT()).times.max()) >= 1.0


@pytest.mark.parametrize("sigma0", [1.0, 5.0])
def test_every_family_equals_its_non_stationary_form(family: Family, scheduler: Scheduler, sigma0: float) -> None:
    """family.sample(u, x0) == to_ns(family).sample(u, x0) on a nonlinear u; on VP a query at t=1 is rejected."""
    solver = GridSolver(family, affordable_nfe(family, 6), Grid("warped", p=1.6, q=1.2), sigma0)
    if scheduler.velocity_is_singular_at_end and _queries_the_data_end(solver):
        with pytest.raises(ValueError, match=r"velocity of the .* scheduler is infinite at t=1; use a solver that"):
            solver.to_ns(scheduler)
        return
    field, x0 = nonlinear_field(scheduler), noise(4, 3)
    theta = solver.to_ns(scheduler)
    assert theta.nfe == solver.nfe
    assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < TO_ROUNDING


@pytest.mark.parametrize("scheduler", [CondOT(), VP()], ids=lambda scheduler: scheduler.name)
@pytest.mark.parametrize(("learnable", "family"), learnable_starts(allowed=True), ids=lambda family: family.label)
def test_every_learnable_family_starts_at_the_given_solver(
    learnable: LearnableFamily, family: Family, scheduler: Scheduler
) -> None:
    """to_ns(start(solver)) gives the same samples as solver for any sigma0, so distillation begins at the baseline."""
    for sigma0 in (1.0, 5.0):
        solver = GridSolver(family, affordable_nfe(family, 4), UNIFORM, sigma0)
        if scheduler.velocity_is_singular_at_end and _queries_the_data_end(solver):
            with pytest.raises(ValueError, match=r"velocity of the .* scheduler is infinite at t=1; use a solver that"):
                learnable.start(solver, scheduler)
            continue
        field, x0 = nonlinear_field(scheduler), noise(4, 3)
        start = learnable.start(solver, scheduler)
        theta = learnable.to_ns(start, scheduler, sigma0)
        assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < TO_ROUNDING
        torch.testing.assert_close(learnable.project(start, scheduler, sigma0), start, rtol=0, atol=1e-3)


def test_a_non_stationary_solver_is_its_own_non_stationary_form() -> None:
    """The map is the identity on its image, bit for bit: tracing again loses nothing."""
    theta = GridSolver(AdamsBashforth(3), 5, Grid("warped", p=1.6, q=1.2)).to_ns(CondOT())
    retraced = to_ns(theta, CondOT())
    assert torch.equal(retraced.times, theta.times)
    assert torch.equal(retraced.a, theta.a)
    assert torch.equal(retraced.b, theta.b)


def test_the_form_of_two_euler_steps_matches_a_hand_computation() -> None:
    """x1 = x0 + u_0/2, x2 = x1 + u_1/2 on CondOT: T = (0, 1/2), a = 1, b rows (), (1/2), (1/2, 1/2)."""
    theta = GridSolver(Euler(), 2, UNIFORM).to_ns(CondOT())
    assert theta.times.tolist() == [0.0, 0.5]
    assert theta.a.tolist() == [1.0, 1.0, 1.0]
    assert theta.b.tolist() == [[0.0, 0.0], [0.5, 0.0], [0.5, 0.5]]


def test_preconditioning_is_folded_into_theta() -> None:
    """BNS eq. 49-51: with sigma0, theta still uses the raw velocity, at other times and with other weights.

    One preconditioned Euler step on FM-OT by hand: start at sigma0 x0 with s=sigma0, s'/s = (1-sigma0)/sigma0, t' s =
    1, so the sample is sigma0 x0 + (1-sigma0) x0 + u_0 = x0 + u_0: the step is exact in the scale.
    """
    one_step = GridSolver(Euler(), 1, UNIFORM, sigma0=5.0).to_ns(CondOT())
    assert one_step.a.tolist() == pytest.approx([1.0, 1.0])
    assert one_step.b[1].tolist() == pytest.approx([1.0])
    two_steps = GridSolver(Euler(), 2, UNIFORM, sigma0=5.0).to_ns(CondOT())
    # t = r / (r + sigma0 (1 - r)) at r = 1/2.
    assert two_steps.times.tolist() == pytest.approx([0.0, 1 / 6])


def test_theta_records_a_start_that_is_not_x0() -> None:
    """Sampling starts from sigma(0) x0 on VP and from sigma(t_min) x0 on a cut path; a_0 and t_0 store this."""
    theta = GridSolver(Euler(), 3, UNIFORM).to_ns(VP())
    assert float(theta.a[0]) == float(VP().sigma(0.0)) < 1
    cut = GridSolver(Euler(), 3, UNIFORM).to_ns(CondOT(t_min=0.25))
    assert (float(cut.times[0]), float(cut.a[0])) == (0.25, 0.75)


def _weights(length: int) -> Tensor:
    return torch.sin(torch.arange(1, length + 1, dtype=torch.float64))


@pytest.mark.parametrize("scheduler", [CondOT(), VP(), DiscreteVP()], ids=lambda scheduler: scheduler.name)
def test_the_map_is_differentiable_in_the_exponents_of_a_grid(family: Family, scheduler: Scheduler) -> None:
    """d theta / dp and d theta / dq of the warped grid t = (1-(1-r)^p)^q, against finite differences."""
    nfe = affordable_nfe(family, 6)
    if scheduler.velocity_is_singular_at_end and _queries_the_data_end(GridSolver(family, nfe, UNIFORM)):
        pytest.skip("this family queries t=1, where the scheduler's velocity is infinite")

    def scalar(p: Tensor, q: Tensor) -> Tensor:
        theta = GridSolver(family, nfe, Grid("warped", p=p, q=q)).to_ns(scheduler)  # type: ignore[arg-type]
        return theta.flat() @ _weights(theta.flat().shape[0])

    p, q = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.6, 1.2))
    gradients = torch.autograd.grad(scalar(p, q), (p, q))
    constant_p, constant_q = p.detach(), q.detach()
    by_p = central_difference(lambda value: scalar(value, constant_q), 1.6)
    by_q = central_difference(lambda value: scalar(constant_p, value), 1.2)
    assert [float(g) for g in gradients] == pytest.approx([float(by_p), float(by_q)], rel=1e-6, abs=1e-7)
    assert all(float(g) != 0 for g in gradients)


@pytest.mark.parametrize("scheduler", [CondOT(), Cosine(), VP()], ids=lambda scheduler: scheduler.name)
def test_bns_is_differentiable_through_its_preconditioning(scheduler: Scheduler) -> None:
    """The chain rule from theta on the raw velocity back to BNS parameters at sigma0 = 2, entry by entry."""
    family, sigma0 = BNS(), 2.0
    parameters = family.start(GridSolver(AdamsBashforth(2), 3, UNIFORM, sigma0), scheduler).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: family.to_ns(p, scheduler, sigma0).flat(), parameters, atol=1e-6)


def test_learned_times_are_traced_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """A warning per training step would flood every log."""
    parameters = BNS().start(GridSolver(Euler(), 3, UNIFORM, 2.0), CondOT()).requires_grad_()
    BNS().to_ns(parameters, CondOT(), 2.0).flat().sum().backward()
    assert [str(warning.message) for warning in recwarn] == []


class _Custom:
    """A solver defined by a function, with the NFE it declares."""

    def __init__(self, nfe: int, step: Callable[[VelocityField, Tensor], Tensor]):
        self.nfe, self.step = nfe, step

    def sample(self, velocity: VelocityField, x0: Tensor) -> Tensor:
        return self.step(velocity, x0)


def _euler_steps(count: int) -> Callable[[VelocityField, Tensor], Tensor]:
    def step(velocity: VelocityField, x: Tensor) -> Tensor:
        for i in range(count):
            x = x + velocity(x, torch.tensor(i / count, dtype=torch.float64)) / count
        return x

    return step


def test_any_linear_solver_has_a_non_stationary_form() -> None:
    """Anything with ``nfe`` and ``sample`` is a solver; no registration is needed."""
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    solver = _Custom(3, _euler_steps(3))
    assert relative_error(to_ns(solver, CondOT()).sample(field, x0), solver.sample(field, x0)) < TO_ROUNDING


@pytest.mark.parametrize("declared", [2, 3])
def test_a_solver_that_makes_more_evaluations_than_it_declares_is_rejected(declared: int) -> None:
    with pytest.raises(ValueError, match=f"declares {declared} evaluations but makes more; correct its nfe"):
        to_ns(_Custom(declared, _euler_steps(4)), CondOT())


def test_a_solver_that_makes_fewer_evaluations_than_it_declares_is_rejected() -> None:
    with pytest.raises(ValueError, match="the solver declares 5 evaluations but made 4"):
        to_ns(_Custom(5, _euler_steps(4)), CondOT())


def test_a_solver_that_leaves_the_domain_is_rejected() -> None:
    outside = _Custom(1, lambda velocity, x: x + velocity(x, torch.tensor(1.5, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"velocity queried at t=1\.5, outside the domain \[0, 1\] of the cond_ot"):
        to_ns(outside, CondOT())


def test_a_solver_with_infinite_coefficients_is_rejected() -> None:
    """alpha'/alpha at t=0 (Table 1 taken literally) is infinite."""

    def step(velocity: VelocityField, x: Tensor) -> Tensor:
        t = torch.tensor(0.0, dtype=torch.float64)
        return x / t + velocity(x, t)

    with pytest.raises(ValueError, match="no finite non-stationary form on the cond_ot scheduler"):
        to_ns(_Custom(1, step), CondOT())


# --- Non-linear solvers -------------------------------------------------------------------------------------------


def _euler_with(operation: Callable[[Tensor], object]) -> _Custom:
    """Two Euler steps, with the result of ``operation`` on the intermediate state added to it."""

    def step(velocity: VelocityField, x: Tensor) -> Tensor:
        x = x + 0.5 * velocity(x, torch.tensor(0.0, dtype=torch.float64))
        x = x + operation(x)
        return x + 0.5 * velocity(x, torch.tensor(0.5, dtype=torch.float64))

    return _Custom(2, step)


NOT_LINEAR: dict[str, Callable[[Tensor], object]] = {
    "clamp": lambda x: x.clamp(-1, 1),
    "clip": lambda x: torch.clip(x, -1, 1),
    "quantile": lambda x: torch.quantile(x, 0.995),
    "abs": lambda x: x.abs(),
    "tanh": torch.tanh,
    "square": torch.square,
    "pow": lambda x: x**2,
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x),
    "where": lambda x: torch.where(torch.tensor(True), x, x),
    "gt": lambda x: x > 1,
    "max": torch.max,
    "sort": torch.sort,
    "sum": lambda x: x.sum(),
    "getitem": lambda x: x[0],
    "float": lambda x: float(x),
    "item": lambda x: x.item(),
    "reshape": lambda x: x.reshape(-1),
    "exp": torch.exp,
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_non_linear_operation_is_rejected_by_name(name: str) -> None:
    """Thresholding has no non-stationary form; tracing it unguarded would silently give a wrong theta."""
    with pytest.raises(
        ValueError, match=rf"not linear in its states: it applies '{name}' to one, .* leave thresholding"
    ):
        to_ns(_euler_with(NOT_LINEAR[name]), CondOT())


TWO_STATES: dict[str, Callable[[Tensor], object]] = {
    "'mul' of two states": lambda x: x * x,
    "'tensordot' of two states": lambda x: torch.tensordot(x, x, dims=1),
    "'div' by something that is not a single number": lambda x: x / x,
    "'rtruediv'|'rdiv'|'reciprocal'": lambda x: 1 / x,
    "'add' with something that is not a state": lambda x: x + 1,
    "'sub' with something that is not a state": lambda x: x - torch.ones(3, dtype=torch.float64),
    "'rsub' with something that is not a state|'rsub'|'sub' with": lambda x: 1 - x,
    "'mul' with something that is not a single number": lambda x: x * torch.ones(3, dtype=torch.float64),
    "'lerp' with something that is not a single number": lambda x: torch.lerp(x, x, x),
}


@pytest.mark.parametrize("error", TWO_STATES)
def test_a_linear_operation_with_the_wrong_operands_is_rejected(error: str) -> None:
    """Products of states, constants added to a state, and weights that differ between coordinates."""
    with pytest.raises(ValueError, match=f"not linear in its states: it applies (?:{error})"):
        to_ns(_euler_with(TWO_STATES[error]), CondOT())


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "operators": lambda x: -(2 * x - x / 3) * torch.tensor(0.5, dtype=torch.float64) + x,
    "functions": lambda x: torch.add(torch.mul(x, 0.1), torch.neg(x), alpha=0.2),
    "in place": lambda x: x.clone().mul_(0.3).add_(x, alpha=0.1).sub_(x).div_(2),
    "sums": lambda x: sum([x, 2 * x]),  # type: ignore[return-value]
    "stacked": lambda x: torch.tensordot(torch.tensor([0.1, 0.2], dtype=torch.float64), torch.stack([x, -x]), dims=1),
    "interpolated": lambda x: torch.lerp(x, -x, 0.3),
    "copies": lambda x: x.to(torch.float64).clone().contiguous().detach() + torch.zeros_like(x),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_are_traced_correctly(name: str) -> None:
    """The guard changes no values: the form gives the same samples as the solver."""
    solver, field, x0 = _euler_with(LINEAR[name]), nonlinear_field(CondOT()), noise(4, 3)
    assert relative_error(to_ns(solver, CondOT()).sample(field, x0), solver.sample(field, x0)) < TO_ROUNDING


def test_a_solver_that_works_in_place_is_traced_correctly() -> None:
    """Later in-place updates must not change the states already recorded."""

    def step(velocity: VelocityField, x: Tensor) -> Tensor:
        x = x.clone()
        for i in range(3):
            x += velocity(x, torch.tensor(i / 3, dtype=torch.float64)).mul_(1 / 3)
        return x

    in_place, plain = (to_ns(solver, CondOT()) for solver in (_Custom(3, step), _Custom(3, _euler_steps(3))))
    torch.testing.assert_close(in_place.flat(), plain.flat(), rtol=0, atol=1e-15)


@dataclass(frozen=True)
class _Thresholding(Family):
    """Euler with an option to clip, so that the option and not the type decides on linearity."""

    clip: bool = False
    source = "a test"
    label = "Thresholding"
    order = 1

    def integrate(self, velocity: VelocityField, x: Tensor, times: Tensor) -> Tensor:
        x = Euler().integrate(velocity, x, times)
        return x.clamp(-1, 1) if self.clip else x


def test_the_guard_is_not_skipped_for_other_options_of_a_linear_solver() -> None:
    """The guard is skipped only if everything except tensor values equals that of a guarded trace."""
    for _ in range(2):
        GridSolver(_Thresholding(), 3, UNIFORM).to_ns(CondOT())
    for _ in range(2):
        with pytest.raises(ValueError, match="it applies 'clamp' to one"):
            GridSolver(_Thresholding(clip=True), 3, UNIFORM).to_ns(CondOT())


def test_guarded_and_unguarded_traces_are_equal() -> None:
    """The first trace of a solver is guarded and the second is not; theta is equal bit for bit."""
    solver = GridSolver(AdamsBashforth(4), 7, Grid("warped", p=1.23456789, q=1.2), sigma0=3.0)
    first, second = solver.to_ns(VP()), solver.to_ns(VP())
    assert torch.equal(first.flat(), second.flat())


def test_different_families_have_different_forms() -> None:
    """No two families share a theta on the same grid. Two sets of options of one family may, e.g. at few steps."""
    nfe, grid = 8, Grid("warped", p=1.6, q=1.2)
    candidates = [candidate for candidate in fixed_families() if affordable_nfe(candidate, nfe) == nfe]
    forms = [(candidate, GridSolver(candidate, nfe, grid).to_ns(Cosine()).flat()) for candidate in candidates]
    assert len(forms) >= 2
    for (first, first_theta), (second, second_theta) in itertools.combinations(forms, 2):
        if type(first) is not type(second):
            assert not torch.allclose(first_theta, second_theta), f"{first.label} and {second.label}"
