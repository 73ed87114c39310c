"""Schedulers: derivatives, inverses, the ends of the domain, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from oracles import inside, schedulers_found

from solvers.schedulers import VP, CondOT, Cosine, Scheduler


def test_signal_to_noise_rises_strictly_from_the_first_time_to_the_last(scheduler: Scheduler) -> None:
    """BNS section 2: snr(t) is strictly increasing, which is what makes change of scheduler possible."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 201, dtype=torch.float64)
    angles = scheduler.angle(times)
    assert bool((angles.diff() > 0).all())
    assert float(angles[-1]) == pytest.approx(math.pi / 2, abs=1e-12)


def test_derivatives_are_those_of_alpha_and_sigma(scheduler: Scheduler) -> None:
    """d_alpha and d_sigma, written by hand, against autograd through alpha and sigma."""
    t = inside(scheduler, 33).requires_grad_()
    point = scheduler(t)
    (d_alpha,) = torch.autograd.grad(point.alpha.sum(), t, retain_graph=True, allow_unused=True)
    (d_sigma,) = torch.autograd.grad(point.sigma.sum(), t)
    # A constant alpha (variance-exploding paths) has no graph at all.
    expected = torch.zeros_like(t) if d_alpha is None else d_alpha
    torch.testing.assert_close(point.d_alpha.detach(), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(point.d_sigma.detach(), d_sigma, rtol=1e-11, atol=1e-12)


def test_derivatives_hold_up_to_finite_ends(scheduler: Scheduler) -> None:
    """At t_min (and t_max, where the velocity is finite there) d_alpha, d_sigma equal one-sided differences."""
    h = 1e-4
    ends = [(scheduler.t_min, h)]
    if not scheduler.velocity_is_singular_at_end:
        ends.append((scheduler.t_max, -h))
    for end, step in ends:
        here, near, far = (scheduler(end + k * step) for k in (0, 1, 2))
        for name in ("alpha", "sigma"):
            a, b, c = (getattr(point, name) for point in (here, near, far))
            derivative = float((-3 * a + 4 * b - c) / (2 * step))
            assert derivative == pytest.approx(float(getattr(here, f"d_{name}")), rel=1e-5, abs=1e-5)


def test_time_at_angle_inverts_angle_on_the_closed_domain(scheduler: Scheduler) -> None:
    """time_at_angle(angle(t)) = t, both ends included: the angle is finite where log-SNR is not."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 101, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_angle(scheduler.angle(times)), times, rtol=0, atol=1e-11)


def test_time_at_lambda_inverts_log_snr_on_the_closed_domain(scheduler: Scheduler) -> None:
    """time_at_lambda(lambda_(t)) = t, also where log-SNR is infinite at an end."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 101, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_lambda(scheduler.lambda_(times)), times, rtol=0, atol=1e-11)


def test_time_at_lambda_takes_a_plain_number() -> None:
    """Log-SNR 0 is alpha = sigma: the middle of both flow-matching paths."""
    assert float(CondOT().time_at_lambda(0.0)) == pytest.approx(0.5, abs=1e-15)
    assert float(Cosine().time_at_lambda(0.0)) == pytest.approx(0.5, abs=1e-15)


def test_schedules_are_computed_in_double_precision_whatever_is_asked(scheduler: Scheduler) -> None:
    """A float32 time gives float64 alpha and sigma: schedules are scalars, precision costs nothing."""
    point = scheduler(torch.tensor(0.5, dtype=torch.float32))
    assert {value.dtype for value in point} == {torch.float64}


def test_cond_ot_is_the_straight_line() -> None:
    """FM-OT: alpha = t, sigma = 1 - t."""
    alpha, sigma, d_alpha, d_sigma = (float(value) for value in CondOT()(0.3))
    assert (alpha, sigma, d_alpha, d_sigma) == (0.3, 0.7, 1.0, -1.0)


@pytest.mark.parametrize("scheduler", [Cosine(), VP()], ids=["cosine", "vp"])
def test_variance_preserving_paths_keep_alpha_squared_plus_sigma_squared_at_one(scheduler: Scheduler) -> None:
    """alpha^2 + sigma^2 = 1, the condition of v-prediction (BNS Table 1)."""
    point = scheduler(torch.linspace(0, 1, 33, dtype=torch.float64))
    torch.testing.assert_close(point.alpha**2 + point.sigma**2, torch.ones(33, dtype=torch.float64))


def test_cosine_ends_without_a_trace_of_noise() -> None:
    """sigma(1) is exactly 0, which cos(pi/2) in floating point is not."""
    assert float(Cosine().sigma(1.0)) == 0.0


def test_vp_starts_with_a_trace_of_data() -> None:
    """xi_1 = exp(-(20 - 0.1)/4 - 0.1/2) = 0.00657, not 0."""
    assert float(VP()(0.0).alpha) == pytest.approx(0.00657, abs=5e-6)
    assert float(VP()(1.0).sigma) == 0.0


@pytest.mark.parametrize("distance", ["1e-2", "1e-4", "1e-6", "1e-9", "1e-12"])
def test_vp_sigma_keeps_its_digits_next_to_the_data(distance: str) -> None:
    """sqrt(1 - xi^2) computed with 60 decimal digits: expm1 keeps 12 of them where 1 - xi^2 keeps none."""
    t = 1 - float(distance)
    with localcontext() as context:
        context.prec = 60
        s, b_max, b_min = 1 - Decimal(t), Decimal(VP().beta_max), Decimal(VP().beta_min)
        log_xi = -s * s * (b_max - b_min) / 4 - s * b_min / 2
        exact = float((1 - (2 * log_xi).exp()).sqrt())
    assert float(VP().sigma(t)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("t", [-0.01, 1.01, 7.0, float("nan"), float("inf")])
def test_a_time_outside_the_domain_is_refused(scheduler: Scheduler, t: float) -> None:
    with pytest.raises(ValueError, match=r"outside the domain \[0, 1\] of the .* scheduler; choose a time grid inside"):
        scheduler.check_velocity_time(t)


def test_rounding_at_the_ends_is_forgiven() -> None:
    """A grid that oversteps an end by a rounding error is no user's mistake."""
    CondOT().check_velocity_time(1 + 1e-12)
    CondOT().check_velocity_time(torch.tensor(-1e-12, dtype=torch.float64))
    with pytest.raises(ValueError, match="outside the domain"):
        CondOT().check_velocity_time(1 + 1e-6)


def test_a_cut_domain_refuses_what_was_cut_away() -> None:
    with pytest.raises(ValueError, match=r"t=0\.05, outside the domain \[0\.1, 0\.9\] of the cosine scheduler"):
        Cosine(t_min=0.1, t_max=0.9).check_velocity_time(0.05)


def test_vp_velocity_at_the_data_end_is_refused_with_the_way_out() -> None:
    """sigma' is infinite at t=1: the error names the solvers and the scheduler that avoid it."""
    with pytest.raises(ValueError, match=r"velocity of the vp scheduler is infinite at t=1; .*cond_ot scheduler"):
        VP().check_velocity_time(1.0)
    VP().check_velocity_time(1 - 1e-6)


def test_vp_cut_before_the_data_end_may_be_asked_at_its_last_time() -> None:
    """The velocity is infinite at t=1 alone, not at the end of a domain that stops before."""
    VP(t_max=0.99).check_velocity_time(0.99)
    assert math.isfinite(float(VP(t_max=0.99)(0.99).d_sigma))


def test_only_vp_is_singular_among_paths_with_finite_derivatives() -> None:
    """velocity_is_singular_at_end says what the derivatives do at t_max."""
    for scheduler in schedulers_found():
        finite = bool(torch.isfinite(scheduler(scheduler.t_max).d_sigma))
        assert scheduler.velocity_is_singular_at_end is not finite, scheduler.name


def test_a_time_that_carries_a_gradient_is_checked_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Learned times require gradients; checking them must not warn in every training step."""
    CondOT().check_velocity_time(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(("t_min", "t_max"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_empty_or_overlong_domain_is_refused(t_min: float, t_max: float) -> None:
    with pytest.raises(ValueError, match="domain must satisfy 0 <= t_min < t_max <= 1, got t_min="):
        CondOT(t_min=t_min, t_max=t_max)
