"""Scale-time transforms: finite ends, derivatives, preconditioning, folding into theta, and the ScaleTime family."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from oracles import (
    all_schedulers,
    central_difference,
    fine_rk4,
    gaussian,
    inside,
    mixture,
    noise,
    nonlinear_field,
    relative_error,
)

from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import GridSolver
from solvers.families.ddim import DDIM
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.families.scale_time import ScaleTime
from solvers.grids import UNIFORM, Grid
from solvers.ns import NSSolver
from solvers.prediction import PredictionField
from solvers.scale_time import Preconditioned, SchedulerChange, TransformedField, on_source, precondition
from solvers.schedulers import EDM, VP, CondOT, Cosine, Scheduler

FINITE_PAIRS = [
    (CondOT(), Cosine()),
    (Cosine(), CondOT()),
    *((base, precondition(base, sigma0)) for base in (CondOT(), Cosine()) for sigma0 in (0.5, 2.0, 5.0, 10.0)),
]
ALL_PAIRS = [
    *((source, target) for source, target in itertools.product(all_schedulers(), repeat=2) if source != target),
    *((base, precondition(base, sigma0)) for base in all_schedulers() for sigma0 in (2.0, 5.0, 10.0)),
]


def _pair_name(value: Scheduler) -> str:
    return value.name.replace(" ", "_")


@pytest.mark.parametrize(("source", "target"), FINITE_PAIRS, ids=_pair_name)
def test_the_transform_is_finite_at_both_ends(source: Scheduler, target: Scheduler) -> None:
    """sigma-bar/sigma is 0/0 at r=1, but a ratio of hypots is not. The ends of the two paths map to each other."""
    change = SchedulerChange(source, target)
    assert (change.target.t_min, change.target.t_max) == (0.0, 1.0)
    for end in (0.0, 1.0):
        point = change(end)
        assert all(math.isfinite(float(value)) for value in point)
        assert float(point.t) == pytest.approx(end, abs=1e-15)
    # At r=1 both paths are at the data itself, alpha = alpha-bar = 1.
    assert float(change(1.0).s) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS, ids=_pair_name)
def test_scale_and_time_relate_the_two_paths(source: Scheduler, target: Scheduler) -> None:
    """BNS eq. 8: alpha-bar_r = s alpha_t and sigma-bar_r = s sigma_t."""
    change = SchedulerChange(source, target)
    for r in inside(change.target):
        point = change(r)
        outer, inner = target(r), source(point.t)
        torch.testing.assert_close(point.s * inner.alpha, outer.alpha, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(point.s * inner.sigma, outer.sigma, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS, ids=_pair_name)
def test_the_derivatives_of_time_and_scale_match_finite_differences(source: Scheduler, target: Scheduler) -> None:
    """d_t = dt/dr and d_log_s = (ds/dr)/s."""
    change = SchedulerChange(source, target)
    for r in inside(change.target):
        point = change(r)
        d_t = central_difference(lambda value: change.time_and_scale(value)[0], float(r))
        d_log_s = central_difference(lambda value: change.time_and_scale(value)[1].log(), float(r))
        assert float(point.d_t) == pytest.approx(float(d_t), rel=1e-6, abs=1e-7)
        assert float(point.d_log_s) == pytest.approx(float(d_log_s), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("source", "target"), FINITE_PAIRS, ids=_pair_name)
def test_the_derivatives_are_right_at_the_ends(source: Scheduler, target: Scheduler) -> None:
    """One-sided differences at r=0 and r=1, where other forms of the same derivatives are 0/0."""
    change, h = SchedulerChange(source, target), 1e-4
    for end, step in ((0.0, h), (1.0, -h)):
        times, log_scales = [], []
        for k in range(3):
            time, scale = change.time_and_scale(end + k * step)
            times.append(float(time))
            log_scales.append(float(scale.log()))
        for name, (a, b, c) in (("d_t", times), ("d_log_s", log_scales)):
            expected = (-3 * a + 4 * b - c) / (2 * step)
            assert float(getattr(change(end), name)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sigma0", [0.5, 2.0, 5.0, 10.0])
def test_preconditioning_flow_matching_matches_its_closed_form(sigma0: float) -> None:
    """FM-OT: s = r + sigma0 (1-r), t = r/s, t' = sigma0/s^2, s' = 1 - sigma0, on the closed interval."""
    change = SchedulerChange(CondOT(), precondition(CondOT(), sigma0))
    for r in torch.linspace(0, 1, 21, dtype=torch.float64):
        point, s = change(r), float(r) + sigma0 * (1 - float(r))
        values = [float(point.s), float(point.t), float(point.d_t), float(point.d_log_s * point.s)]
        assert values == pytest.approx([s, float(r) / s, sigma0 / s**2, 1 - sigma0], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("sigma0", "uncut"), [(2.0, -0.067), (5.0, -0.150), (10.0, -0.209)])
def test_preconditioning_vp_starts_at_the_networks_first_time(sigma0: float, uncut: float) -> None:
    """Without a cut, r=0 would need VP at t < 0. The domain is cut to [r_0, 1] with snr-bar(r_0) = snr(0)."""
    target = precondition(VP(), sigma0)
    assert float(VP().time_at_angle(target.angle(0.0))) == pytest.approx(uncut, abs=6e-4)
    change = SchedulerChange(VP(), target)
    first = change.target.t_min
    assert first > 0
    assert float(change.target.lambda_(first)) == pytest.approx(float(VP().lambda_(0.0)), abs=1e-9)
    assert float(change(first).t) == pytest.approx(0.0, abs=1e-12)
    assert change.target.t_max == 1.0


@pytest.mark.parametrize("sigma0", [2.0, 5.0, 10.0])
def test_a_preconditioned_start_is_the_scaled_start_of_the_path(sigma0: float) -> None:
    """sigma-bar(r_0) x0 = s(r_0) sigma(0) x0.

    On a path that starts at snr = 0 the scale is sigma0. On VP, eq. 8 solved at r_0 by hand gives s = sigma0 / sqrt(1 +
    (sigma0^2 - 1) alpha_0^2), which is slightly smaller (1.99987 for 2).
    """
    change = SchedulerChange(VP(), precondition(VP(), sigma0))
    scale = float(change(change.target.t_min).s)
    assert scale == pytest.approx(sigma0 / math.sqrt(1 + (sigma0**2 - 1) * float(VP()(0.0).alpha) ** 2), rel=1e-10)
    start = float(change.target.sigma(change.target.t_min))
    assert start == pytest.approx(scale * float(VP().sigma(0.0)), rel=1e-12)
    if sigma0 == 2.0:
        assert (scale, float(VP().sigma(0.0))) == pytest.approx((1.99987, 0.99998), abs=5e-6)
    flow = SchedulerChange(CondOT(), precondition(CondOT(), sigma0))
    assert float(flow(0.0).s) == sigma0


@pytest.mark.parametrize("sigma0", [2.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 0.9), (0.1, 0.9), (0.37, 0.77)])
def test_the_original_path_is_never_queried_outside_its_domain(sigma0: float, t_min: float, t_max: float) -> None:
    """The inverse of a schedule overshoots by rounding, but a network's first and last times are exact limits."""
    for source in (CondOT(t_min=t_min, t_max=t_max), Cosine(t_min=t_min, t_max=t_max), VP(t_min=t_min, t_max=t_max)):
        change = SchedulerChange(source, precondition(source, sigma0))
        for r, end in ((change.target.t_min, t_min), (change.target.t_max, t_max)):
            time = float(change.time_and_scale(r)[0])
            assert t_min <= time <= t_max
            assert time == pytest.approx(end, abs=1e-10)


def test_a_target_that_starts_above_pure_noise_keeps_its_whole_domain() -> None:
    """CondOT presented as VP: CondOT has every SNR that VP has."""
    change = SchedulerChange(CondOT(), VP())
    assert (change.target.t_min, change.target.t_max) == (0.0, 1.0)
    assert float(change.time_and_scale(0.0)[0]) > 0


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS, ids=_pair_name)
def test_a_transformed_exact_velocity_is_the_exact_velocity_of_the_target(source: Scheduler, target: Scheduler) -> None:
    """BNS eq. 7: on data with a known velocity under every scheduler, the transform gives the target's velocity."""
    data, x = mixture(), noise(5, 2)
    field = TransformedField(data.field(source), target)
    for r in inside(field.scheduler):
        assert relative_error(field(x, r), data.velocity(x, target(r))) < 1e-7


@pytest.mark.parametrize(
    ("source", "target"),
    [*FINITE_PAIRS, *((VP(t_min=0.2, t_max=0.9), target) for target in (CondOT(), Cosine(), precondition(VP(), 2.0)))],
    ids=_pair_name,
)
def test_a_transformed_trajectory_ends_at_the_same_sample(source: Scheduler, target: Scheduler) -> None:
    """x-bar(r) = s_r x(t_r): start from s x0, integrate the transformed field, and divide by s.

    The field is not the velocity of a path: a scale-time transform is a change of variables for any ODE.
    """
    field, x0 = nonlinear_field(source), noise(4, 2)
    expected = fine_rk4(field, x0, source.t_min, source.t_max, steps=200)
    transformed = TransformedField(field, target)
    first, last = transformed.scheduler.t_min, transformed.scheduler.t_max
    scale = transformed.change(first).s
    restored = transformed.restore(fine_rk4(transformed, scale * x0, first, last, steps=200))
    assert relative_error(restored, expected) < 2e-6


def test_every_path_couples_a_gaussians_noise_and_data_alike() -> None:
    """BNS Theorem 2.3 in closed form: under CondOT and cosine the flow of N(m, s^2) is x1 = m + s x0."""
    x0 = noise(6, 2)
    expected = torch.tensor([0.7, -0.4], dtype=torch.float64) + 0.5 * x0
    for scheduler in (CondOT(), Cosine()):
        assert relative_error(fine_rk4(gaussian().field(scheduler), x0, 0.0, 1.0, steps=100), expected) < 1e-7


def test_every_path_couples_a_mixtures_noise_and_data_alike() -> None:
    """BNS Theorem 2.3 for data without a closed-form flow: the same x0 ends at the same x1 on both paths."""
    x0 = noise(6, 2)
    straight, curved = (
        fine_rk4(mixture().field(scheduler), x0, 0.0, 1.0, steps=100) for scheduler in (CondOT(), Cosine())
    )
    assert relative_error(curved, straight) < 1e-7
    assert relative_error(straight, x0) > 0.1


def test_a_vp_network_couples_the_same_noise_and_data_in_cond_ot_time() -> None:
    """VP sampled in its own time and as CondOT gives the same sample once states are matched at equal SNR."""
    data, x0 = mixture(), noise(6, 2)
    presented = PredictionField(data.network("epsilon", VP()), "epsilon", VP(), CondOT())
    first = presented.scheduler.t_min
    in_cond_ot_time = fine_rk4(presented, presented.scheduler.sigma(first) * x0, first, 1.0, steps=100)
    # VP's own velocity cannot be integrated up to t=1, so continue on CondOT from the time of equal snr.
    last = 0.95
    in_vp_time = fine_rk4(data.field(VP()), VP().sigma(0.0) * x0, 0.0, last, steps=200)
    change = SchedulerChange(VP(), CondOT())
    r = float(CondOT().time_at_angle(VP().angle(last)))
    finished = fine_rk4(presented, in_vp_time * change.time_and_scale(r)[1], r, 1.0, steps=50)
    assert relative_error(finished, in_cond_ot_time) < 1e-6


def test_preconditioned_inverts_its_own_angle(scheduler: Scheduler, sigma0: float) -> None:
    """time_at_angle(angle(t)) = t for sigma-bar = sigma0 sigma."""
    target = Preconditioned(base=scheduler, sigma0=sigma0)
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(target.time_at_angle(target.angle(times)), times, rtol=0, atol=1e-11)


def test_preconditioning_with_sigma0_one_returns_the_scheduler_itself(scheduler: Scheduler) -> None:
    assert precondition(scheduler, 1.0) is scheduler


@pytest.mark.parametrize("sigma0", [0.0, -2.0, float("nan")])
def test_a_sigma0_that_is_not_positive_is_rejected(sigma0: float) -> None:
    with pytest.raises(ValueError, match=f"sigma0 must be positive, got {sigma0}"):
        precondition(CondOT(), sigma0)


def test_preconditioning_twice_is_rejected_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="multiply the two sigma0 instead"):
        precondition(precondition(CondOT(), 2.0), 2.0)


def test_a_query_outside_the_cut_domain_is_rejected() -> None:
    """On VP with sigma0 = 2 the domain starts at r_0, and the message names the preconditioned scheduler."""
    field = TransformedField(nonlinear_field(VP()), precondition(VP(), 2.0))
    with pytest.raises(ValueError, match=r"outside the domain \[0\.0718.*, 1\] of the vp with sigma0=2 scheduler"):
        field(noise(1, 2), torch.tensor(0.0, dtype=torch.float64))


# --- Folding a solver of the transformed field into the field itself -----------------------------------------------


def generic_solver(scheduler: Scheduler) -> NSSolver:
    """A generic non-stationary solver: random weights, and unordered times inside the domain."""
    generator = torch.Generator().manual_seed(5)
    times = inside(scheduler)[[2, 0, 6, 4]]
    a = torch.randn(5, dtype=torch.float64, generator=generator)
    return NSSolver(times, a, torch.randn(5, 4, dtype=torch.float64, generator=generator).tril(-1))


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS, ids=_pair_name)
def test_a_solver_is_folded_into_the_source_in_closed_form(source: Scheduler, target: Scheduler) -> None:
    """The folded theta gives the same samples as the solver on the transformed field, in as many evaluations."""
    field, x0 = nonlinear_field(source), noise(4, 2)
    transformed = TransformedField(field, target)
    solver = generic_solver(transformed.scheduler)
    expected = transformed.restore(solver.sample(transformed, x0))
    assert relative_error(on_source(solver, transformed.change).sample(field, x0), expected) < 1e-10


def test_the_fold_is_differentiable_in_all_of_theta() -> None:
    """In times, a and b, because a preconditioned BNS solver is trained through the fold."""
    change = SchedulerChange(CondOT(), precondition(CondOT(), 2.0))
    flat = generic_solver(change.target).flat().requires_grad_(True)
    torch.autograd.gradcheck(lambda theta: on_source(NSSolver.from_flat(theta), change).flat(), flat)


def test_the_fold_rejects_a_time_outside_the_domain() -> None:
    change = SchedulerChange(CondOT(), precondition(CondOT(), 2.0))
    solver = dataclasses.replace(
        generic_solver(change.target), times=torch.tensor([0, 0.5, 1.2, 1], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match=r"t=1\.2, outside the domain \[0, 1\] of the cond_ot with sigma0=2"):
        on_source(solver, change)


# --- The ScaleTime family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma0", [0.5, 2.0, 5.0])
def test_scale_time_with_sigma0_equals_the_preconditioned_solver(sigma0: float) -> None:
    """This holds on grids that are defined in time."""
    grid = Grid("warped", p=1.6, q=1.2)
    wrapped = GridSolver(ScaleTime(inner="midpoint", sigma0=sigma0), 8, grid).to_ns(Cosine())
    plain = GridSolver(Midpoint(), 8, grid, sigma0).to_ns(Cosine())
    torch.testing.assert_close(wrapped.flat(), plain.flat(), rtol=1e-10, atol=1e-12)


def test_scale_time_runs_the_inner_family_on_the_target_path() -> None:
    """Compared with the same family on the target path's exact velocity, on a grid over the target's domain."""
    data, x0 = mixture(), noise(5, 2)
    solver = ScaleTime(inner="adams_bashforth", inner_options={"steps_back": 3}, scheduler="cosine")
    sample = GridSolver(solver, 6, UNIFORM).sample(data.field(CondOT()), x0)
    expected = GridSolver(AdamsBashforth(3), 6, UNIFORM).sample(data.field(Cosine()), x0)
    assert relative_error(sample, expected) < 1e-10


def test_a_target_that_starts_with_less_noise_starts_later() -> None:
    """EDM's path begins at sigma/alpha = 80, i.e. t = 1/81 on CondOT: the first query is there, at x = (80/81) x0."""
    theta = GridSolver(ScaleTime(inner="euler", scheduler="edm"), 4, UNIFORM).to_ns(CondOT())
    assert (float(theta.times[0]), float(theta.a[0])) == pytest.approx((1 / 81, 80 / 81), rel=1e-12)


def test_a_grid_on_the_target_is_laid_over_the_targets_domain() -> None:
    """Uniform over EDM's domain means uniform in sigma: of two steps, the first goes half-way from 80 to 0.002."""
    theta = GridSolver(ScaleTime(inner="euler", scheduler="edm"), 2, UNIFORM).to_ns(CondOT())
    assert float(theta.times[1]) == pytest.approx(1 / (1 + 80 - (80 - 0.002) / 2), rel=1e-9)


@pytest.mark.parametrize("grid", [Grid("edm"), Grid("ays"), Grid("warped", p=1.6, q=1.2)], ids=lambda grid: grid.kind)
def test_a_grid_on_the_source_keeps_its_noise_levels(grid: Grid) -> None:
    """The grid is mapped at equal SNR, so the network is queried at the grid's own times for any target path."""
    solver = ScaleTime(inner="euler", scheduler="vp", grid_on="source")
    times = GridSolver(solver, 5, grid).to_ns(Cosine(t_min=0.05)).times
    torch.testing.assert_close(times, grid.times(5, Cosine(t_min=0.05))[:-1], rtol=1e-9, atol=1e-12)


def test_ddim_is_the_same_on_every_path_at_equal_noise_levels() -> None:
    """DDIM depends on the path only through SNR, so a change of path at equal SNR has no effect."""
    grid = Grid("ays")
    wrapped = GridSolver(ScaleTime(inner="ddim", scheduler="cosine", grid_on="source"), 6, grid).to_ns(CondOT())
    plain = GridSolver(DDIM(), 6, grid).to_ns(CondOT())
    torch.testing.assert_close(wrapped.flat(), plain.flat(), rtol=1e-9, atol=1e-11)


def test_a_change_of_path_does_not_change_the_limit() -> None:
    """With many steps ST-RK4 converges to the field's own solution, away from both ends."""
    scheduler = CondOT(t_min=0.1, t_max=0.9)
    field, x0 = nonlinear_field(scheduler), noise(4, 2)
    exact = fine_rk4(field, scheduler.sigma(0.1) * x0, 0.1, 0.9, steps=100)
    for target in ("cosine", "vp", "edm", "discrete_vp", "custom"):
        sample = GridSolver(ScaleTime(inner="rk4", scheduler=target), 400, UNIFORM).sample(field, x0)
        assert relative_error(sample, exact) < 2e-4, target


def test_two_preconditionings_multiply() -> None:
    """The sweep's sigma0 and the family's sigma0 combine into their product."""
    twice = GridSolver(ScaleTime(inner="midpoint", sigma0=2.0), 6, UNIFORM, sigma0=3.0).to_ns(CondOT())
    once = GridSolver(Midpoint(), 6, UNIFORM, sigma0=6.0).to_ns(CondOT())
    torch.testing.assert_close(twice.flat(), once.flat(), rtol=1e-10, atol=1e-12)


def test_scale_time_has_the_cost_and_order_of_its_inner_family() -> None:
    """NFE and order are those of the inner family; the label contains its name and the transform."""
    solver = ScaleTime(inner="rk4", scheduler="edm", scheduler_options={"sigma_max": 50.0}, grid_on="source")
    assert (solver.steps(8), solver.evaluations_per_step, solver.order) == (2, 4, RK4().order)
    assert solver.label == "ST RK4 (edm, sigma_max=50.0, grid on source)"
    assert ScaleTime(sigma0=5.0).label == "ST Midpoint (sigma0=5)"
    with pytest.raises(ValueError, match="RK4 makes 4 evaluations per step"):
        GridSolver(solver, 6, UNIFORM)


def test_the_fields_own_scheduler_changes_nothing() -> None:
    """The identity transform: cosine stepped along cosine."""
    wrapped = GridSolver(ScaleTime(inner="euler", scheduler="cosine"), 5, UNIFORM).to_ns(Cosine())
    plain = GridSolver(Euler(), 5, UNIFORM).to_ns(Cosine())
    torch.testing.assert_close(wrapped.flat(), plain.flat(), rtol=1e-9, atol=1e-12)


def test_a_grid_on_the_source_beyond_the_targets_noise_levels_is_rejected() -> None:
    """EDM has no noise level above 80, while CondOT's first listed time has 999."""
    solver = GridSolver(ScaleTime(scheduler="edm", grid_on="source"), 4, Grid("given", listed=(0.001,)))
    error = (
        r"the grid's time 0\.001 has a noise level that the path of the edm scheduler does not reach; use grid_on='tar"
    )
    with pytest.raises(ValueError, match=error):
        solver.to_ns(CondOT())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sigma0": 1.0}, "scale_time with sigma0=1 and no scheduler changes nothing; set one of them"),
        ({"sigma0": -1.0}, r"sigma0 must be positive, got -1\.0"),
        ({"inner": "no_such"}, "there is no solver family 'no_such'"),
        ({"inner": "bns"}, "family 'bns' is learned itself and cannot be wrapped"),
        ({"inner": "euler", "inner_options": {"k": 1}}, r"family 'euler' refuses the options \{'k': 1\}"),
        ({"scheduler": "no_such"}, "there is no scheduler 'no_such'; `bespoke list schedulers`"),
        ({"scheduler_options": {"sigma_max": 50.0}}, "scheduler_options belong to a scheduler of scale_time; name it"),
        ({"grid_on": "both"}, "grid_on must be one of target, source, got 'both'"),
    ],
    ids=["nothing", "negative", "family", "learned", "options", "scheduler", "orphans", "grid"],
)
def test_invalid_scale_time_options_are_rejected(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ScaleTime(**options)  # type: ignore[arg-type]


def test_the_edm_field_can_be_presented_under_cond_ot() -> None:
    """EDM's path ends before the data, and so does the transformed one, where ``restore`` divides by the scale."""
    field = TransformedField(mixture().field(EDM()), CondOT())
    assert (field.scheduler.t_min, field.scheduler.t_max) == pytest.approx((1 / 81, 1 / 1.002), rel=1e-9)
