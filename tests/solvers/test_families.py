"""Solver families: convergence orders, exactness properties, and rejected input."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    affordable_nfe,
    fine_rk4,
    fixed_families,
    gaussian,
    learnable_families,
    learnable_starts,
    mixture,
    noise,
    nonlinear_field,
    relative_error,
)
from torch import Tensor

from solvers.families._dpmpp import DPMppMultistep
from solvers.families.adams_bashforth import AdamsBashforth, variable_step_weights
from solvers.families.base import ButcherTableau, Family, GridSolver, LearnableFamily, RungeKutta
from solvers.families.bns import BNS
from solvers.families.ddim import DDIM
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.field import FunctionField
from solvers.grids import UNIFORM, Grid
from solvers.scale_time import SchedulerChange
from solvers.schedulers import VP, CondOT, Cosine, Scheduler

#: Exponential integrators step in log-SNR, so they have an order only where it is finite and smooth. On the whole of
#: CondOT their first and last steps are infinitely long, however many steps there are.
INTERIOR = CondOT(t_min=0.1, t_max=0.9)


@functools.cache
def _reference() -> tuple[Tensor, Tensor]:
    """(x0, x at t_max) of a mixture's ODE on the interior, accurate to about 1e-12."""
    x0 = noise(16, 2)
    start = INTERIOR.sigma(INTERIOR.t_min) * x0
    return x0, fine_rk4(mixture().field(INTERIOR), start, INTERIOR.t_min, INTERIOR.t_max, steps=1000)


def test_the_error_falls_with_the_declared_order(family: Family) -> None:
    """On a smooth nonlinear ODE the slope of log error against log steps is -order (within 0.2)."""
    if family.order is None:
        pytest.skip("this family claims no order")
    x0, exact = _reference()
    steps = [64, 128, 256]
    errors = []
    for count in steps:
        nfe = affordable_nfe(family, count * family.evaluations_per_step)
        sample = GridSolver(family, nfe, UNIFORM).sample(mixture().field(INTERIOR), x0)
        errors.append(float((sample - exact).square().mean().sqrt()))
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-family.order, abs=0.2), errors


def test_more_evaluations_reduce_the_error(family: Family, scheduler: Scheduler) -> None:
    """On the whole domain, ends included, 32 evaluations more than halve the error of 8 (VP only if usable there)."""
    data, x0 = mixture(), noise(16, 2)
    # A uniform grid on the variance-exploding path is uniform in sigma, which suits no solver.
    grid = Grid("edm") if scheduler.name == "edm" else UNIFORM
    if isinstance(family, DPMppMultistep) and family.highest == 3 and scheduler.name == "discrete_vp":
        # A full third-order last step is unstable on uniform times; the method's own grid is uniform in log-SNR.
        grid = Grid("log_snr")
    coarse, fine = (GridSolver(family, affordable_nfe(family, nfe), grid) for nfe in (8, 32))
    if scheduler.velocity_is_singular_at_end:
        try:
            fine.to_ns(scheduler)
        except ValueError:
            pytest.skip("this family queries t=1, where the scheduler's velocity is infinite")
    # Every path couples noise and data as CondOT does (BNS Theorem 2.3); VP's trace of data at t=0 is below 0.02.
    exact = fine_rk4(mixture().field(CondOT()), x0, 0.0, 1.0, steps=200)
    errors = [float((s.sample(data.field(scheduler), x0) - exact).square().mean().sqrt()) for s in (coarse, fine)]
    assert errors[1] < 0.5 * errors[0], errors


def test_every_family_has_a_unique_label_and_a_source() -> None:
    """Tables and figures identify families by their labels."""
    families = [*fixed_families(), *learnable_families()]
    labels = [family.label for family in families]
    assert len(set(labels)) == len(labels)
    assert all(family.source for family in families)


@pytest.mark.parametrize(("learnable", "unsupported"), learnable_starts(allowed=False), ids=lambda family: family.label)
def test_a_learnable_family_rejects_the_starts_it_cannot_equal(learnable: LearnableFamily, unsupported: Family) -> None:
    """The error names a remedy; silently starting elsewhere would not be a distillation of the given solver."""
    with pytest.raises(ValueError, match="start"):
        learnable.start(GridSolver(unsupported, affordable_nfe(unsupported, 4), UNIFORM), CondOT())


@pytest.mark.parametrize("learnable", learnable_families(), ids=lambda family: family.label)
def test_a_learnable_family_lists_existing_starts(learnable: LearnableFamily) -> None:
    """``starts`` holds module names of fixed families, as in a configuration, or is None for any solver."""
    fixed = {type(family).__module__.rpartition(".")[2] for family in fixed_families()}
    assert learnable.starts is None or (learnable.starts and set(learnable.starts) <= fixed)


def test_a_family_rejects_zero_evaluations_and_suggests_valid_nfe(family: Family) -> None:
    """The message lists the nearest valid values."""
    with pytest.raises(ValueError, match=r"NFE must be a positive multiple of .*, got 0; use "):
        family.steps(0)


def test_an_nfe_between_two_steps_is_rejected_with_both_neighbours() -> None:
    with pytest.raises(ValueError, match=r"RK4 makes 4 evaluations per step, .* multiple of 4, got 10; use 8 or 12"):
        GridSolver(RK4(), 10, UNIFORM)
    with pytest.raises(ValueError, match=r"Midpoint makes 2 .* got 1; use 2 or 4"):
        Midpoint().steps(1)


@pytest.mark.parametrize("steps_back", [1, 5])
def test_adams_bashforth_rejects_fewer_than_two_or_more_than_four_steps_back(steps_back: int) -> None:
    with pytest.raises(ValueError, match=f"adams_bashforth takes steps_back 2, 3 or 4, got {steps_back}"):
        AdamsBashforth(steps_back)


# --- Runge-Kutta: quadrature rules if the velocity does not depend on x -----------------------------------------


@pytest.mark.parametrize(
    ("method", "degree"), [(Euler(), 0), (Midpoint(), 1), (Heun(), 1), (RK4(), 3)], ids=lambda value: str(value)
)
def test_runge_kutta_integrates_polynomials_exactly_up_to_its_degree(method: RungeKutta, degree: int) -> None:
    """On u(t) = t^d: the left rectangle, midpoint, trapezoidal and Simpson rules, on a non-uniform grid."""
    times = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)

    def integral(power: int) -> float:
        field = FunctionField(lambda x, t: (t**power).expand_as(x), CondOT())
        return float(method.integrate(field, torch.zeros(1, dtype=torch.float64), times))

    for power in range(degree + 1):
        assert integral(power) == pytest.approx(1 / (power + 1), abs=1e-14)
    assert abs(integral(degree + 1) - 1 / (degree + 2)) > 1e-4


@pytest.mark.parametrize("method", [Heun(), RK4()], ids=lambda method: method.label)
def test_a_stage_at_the_end_of_a_step_is_at_the_next_grid_time_exactly(method: RungeKutta) -> None:
    """t + (t' - t) may differ from t' in floating point and exceed the last time a network accepts."""
    scheduler, grid, per_step = CondOT(), Grid("warped", p=1.6, q=1.2), method.evaluations_per_step
    for steps in range(1, 25):
        times = GridSolver(method, per_step * steps, grid).to_ns(scheduler).times
        assert torch.equal(times[per_step - 1 :: per_step], grid.times(steps, scheduler)[1:])


def test_rk4_on_a_linear_ode_gives_the_exponential_series_to_fourth_order() -> None:
    """One step of x' = x from 1 is 1 + 1 + 1/2 + 1/6 + 1/24, which misordered stages would not give."""
    field = FunctionField(lambda x, t: x, CondOT())
    one = torch.ones(1, dtype=torch.float64)
    sample = RK4().integrate(field, one, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(sample) == pytest.approx(1 + 1 + 1 / 2 + 1 / 6 + 1 / 24, abs=1e-15)


def test_an_inconsistent_tableau_is_rejected() -> None:
    """ButcherTableau checks that b sums to 1, that rows of a sum to c, and that shapes fit an explicit method."""
    with pytest.raises(ValueError, match="inconsistent tableau: b must sum to 1 and each row of a to its c"):
        ButcherTableau(a=((), (0.5,)), b=(0.5, 0.6), c=(0.0, 0.5))
    with pytest.raises(ValueError, match="inconsistent tableau"):
        ButcherTableau(a=((), (0.5,)), b=(0.5, 0.5), c=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"an explicit tableau of s stages has b and c of length s"):
        ButcherTableau(a=((0.5,), (0.5,)), b=(0.5, 0.5), c=(0.5, 0.5))


# --- Adams-Bashforth ---------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    gaps=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    coefficients=st.lists(st.floats(-2.0, 2.0), min_size=4, max_size=4),
    order=st.integers(1, 4),
)
def test_variable_step_weights_integrate_polynomials_exactly(
    gaps: list[float], coefficients: list[float], order: int
) -> None:
    """AB-k on any grid: sum_j w_j p(t_j) is the integral of p over the step for every p of degree k-1."""
    times = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0) / 4
    t, t_next = times[-2], times[-1]
    nodes = times[:-1].flip(0)[:order]
    weights = variable_step_weights(nodes, t, t_next)
    powers = range(order)
    values = sum(coefficients[d] * nodes**d for d in powers)
    exact = sum(coefficients[d] * (t_next ** (d + 1) - t ** (d + 1)) / (d + 1) for d in powers)
    scale = float(weights.abs().sum()) * 10
    assert float(weights @ values) == pytest.approx(float(exact), abs=1e-12 * scale)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12]), (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24])],
)
def test_variable_step_weights_equal_the_textbook_ones_on_equal_steps(order: int, expected: list[float]) -> None:
    """(3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24, newest first."""
    nodes = torch.arange(order, dtype=torch.float64).flip(0) / 10
    weights = variable_step_weights(nodes, nodes[0], nodes[0] + 0.1)
    assert (weights / 0.1).tolist() == pytest.approx(expected, rel=1e-10)


def test_adams_bashforth_steps_from_the_current_state() -> None:
    """BNS eq. 52 prints x_{i-m+1} in place of x_i: on u = const every step adds exactly its length."""
    field = FunctionField(lambda x, t: torch.ones_like(x), CondOT())
    times = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.0], dtype=torch.float64)
    sample = AdamsBashforth(4).integrate(field, torch.full((1,), 3.0, dtype=torch.float64), times)
    assert float(sample) == pytest.approx(4.0, abs=1e-14)


# --- Exponential integrators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DDIM(), DPMpp2M()], ids=lambda method: method.label)
@pytest.mark.parametrize("scheduler", [CondOT(), Cosine(), VP()], ids=lambda scheduler: scheduler.name)
def test_exponential_integrators_reach_a_single_data_point_exactly(method: Family, scheduler: Scheduler) -> None:
    """With a single data point the data prediction is constant, and both methods integrate it exactly on every path."""
    point = gaussian(mean=(0.7, -0.4), std=0.0)
    sample = GridSolver(method, 3, UNIFORM).sample(point.field(scheduler), noise(5, 2))
    assert relative_error(sample, point.means.expand(5, 2)) < 1e-9


def test_ddim_depends_on_the_path_only_through_the_snr_of_its_times() -> None:
    """The same SNRs on CondOT and on cosine give the same samples."""
    straight, curved = CondOT(), Cosine()
    times = Grid("warped", p=1.6, q=1.2).times(6, straight)
    matched = curved.time_at_angle(straight.angle(times))
    x0 = noise(5, 2)
    on_cond_ot = DDIM().integrate(mixture().field(straight), x0, times)
    on_cosine = DDIM().integrate(mixture().field(curved), x0, matched)
    assert relative_error(on_cosine, on_cond_ot) < 1e-10
    change = SchedulerChange(straight, curved)
    torch.testing.assert_close(torch.stack([change(r).t for r in matched]), times)


def test_ddim_on_cond_ot_equals_euler() -> None:
    """On the straight path an exponential step and an Euler step coincide."""
    grid = Grid("warped", p=1.6, q=1.2)
    ddim, euler = (GridSolver(method, 5, grid).to_ns(CondOT()) for method in (DDIM(), Euler()))
    torch.testing.assert_close(ddim.flat(), euler.flat(), rtol=1e-12, atol=1e-14)


def test_dpmpp_2m_with_two_steps_equals_ddim() -> None:
    """Its first and last steps are of first order, and a first-order step in the data prediction is a DDIM step."""
    two, ddim = (GridSolver(method, 2, UNIFORM).to_ns(Cosine()) for method in (DPMpp2M(), DDIM()))
    torch.testing.assert_close(two.flat(), ddim.flat(), rtol=1e-12, atol=1e-14)
    three, ddim3 = (GridSolver(method, 3, UNIFORM).to_ns(VP()) for method in (DPMpp2M(), DDIM()))
    assert not torch.allclose(three.flat(), ddim3.flat(), rtol=1e-3)


# --- Samples -----------------------------------------------------------------------------------------------------


def test_a_sample_keeps_the_shape_and_precision_of_its_noise(family: Family, sigma0: float) -> None:
    """float32 images stay float32, although every coefficient is float64."""
    x0 = noise(2, 3, 4, 4).float()
    sample = GridSolver(family, affordable_nfe(family, 4), UNIFORM, sigma0).sample(nonlinear_field(CondOT()), x0)
    assert (sample.shape, sample.dtype) == (x0.shape, torch.float32)


def test_samples_of_a_batch_do_not_depend_on_each_other(family: Family) -> None:
    """Row i of a batch equals the sample from noise i alone."""
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    solver = GridSolver(family, affordable_nfe(family, 4), UNIFORM)
    torch.testing.assert_close(solver.sample(field, x0)[2:3], solver.sample(field, x0[2:3]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scheduler", [CondOT(t_min=0.1, t_max=0.8), Cosine(t_max=0.8)], ids=["cond_ot", "cosine"])
def test_preconditioning_does_not_change_the_limit(scheduler: Scheduler, sigma0: float) -> None:
    """With many steps every sigma0 gives the ODE's solution, mapped back to the original path if that ends at t < 1."""
    field, x0 = nonlinear_field(scheduler), noise(4, 2)
    start = scheduler.sigma(scheduler.t_min) * x0
    exact = fine_rk4(field, start, scheduler.t_min, scheduler.t_max, steps=100)
    assert relative_error(GridSolver(RK4(), 400, UNIFORM, sigma0).sample(field, x0), exact) < 1e-5


# --- BNS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nfe", "free"), [(4, 17), (8, 51), (16, 167)])
def test_bns_learns_all_of_theta_but_its_beginning(nfe: int, free: int) -> None:
    """n(n+5)/2 - 1 free parameters: 17, 51, 167 (the paper's Table 3 includes the fixed t_0 and t_n)."""
    parameters = BNS().start(GridSolver(Euler(), nfe, UNIFORM), CondOT())
    assert len(parameters) == free == nfe * (nfe + 5) // 2 - 1
    assert BNS().to_ns(parameters, CondOT(), 1.0).flat().numel() == free + 2


@pytest.mark.parametrize("scheduler", [CondOT(), VP(), CondOT(t_min=0.2)], ids=["cond_ot", "vp", "cut"])
@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_bns_projects_times_back_into_the_domain(scheduler: Scheduler, sigma0: float) -> None:
    """``project`` makes theta usable after any optimiser step; it changes only times, and is idempotent."""
    family = BNS()
    start = family.start(GridSolver(AdamsBashforth(2), 4, UNIFORM, sigma0), scheduler)
    wild = start.clone()
    wild[:3] = torch.tensor([-5.0, 0.6, 7.0], dtype=torch.float64)
    projected = family.project(wild, scheduler, sigma0)
    assert float(projected[1]) == 0.6
    assert torch.equal(projected[3:], start[3:])
    theta = family.to_ns(projected, scheduler, sigma0)
    for t in theta.times:
        scheduler.check_velocity_time(t)
    assert torch.equal(family.project(projected, scheduler, sigma0), projected)


def test_bns_rejects_a_parameter_vector_of_invalid_length() -> None:
    with pytest.raises(ValueError, match="BNS cannot have 20 parameters"):
        BNS().to_ns(torch.zeros(20, dtype=torch.float64), CondOT(), 1.0)
