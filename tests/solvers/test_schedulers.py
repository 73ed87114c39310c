"""Schedulers: derivatives, inverses, the ends of the domain, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
from decimal import Decimal, localcontext

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from oracles import central_difference, inside, schedulers_found
from torch import Tensor

from solvers.schedulers import EDM, VP, CondOT, Cosine, Custom, DiscreteVP, Scheduler
from solvers.schedulers._monotone import invert_increasing, limited_slopes
from solvers.schedulers._named import named_scheduler
from solvers.schedulers.discrete_vp import linear_betas, scaled_linear_betas


def test_signal_to_noise_rises_strictly_from_the_first_time_to_the_last(scheduler: Scheduler) -> None:
    """BNS section 2: snr(t) is strictly increasing, which is what makes change of scheduler possible."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 201, dtype=torch.float64)
    angles = scheduler.angle(times)
    assert bool((angles.diff() > 0).all())


def test_a_path_that_ends_at_t_1_ends_at_the_data(scheduler: Scheduler) -> None:
    """snr(1) is infinite; a path made for a network that never saw clean data ends before, with its last noise."""
    end = float(scheduler.angle(scheduler.t_max))
    assert (scheduler.t_max == 1.0) == (end == pytest.approx(math.pi / 2, abs=1e-12))


def test_derivatives_are_those_of_alpha_and_sigma(scheduler: Scheduler) -> None:
    """d_alpha and d_sigma, written by hand, against autograd through alpha and sigma."""
    t = inside(scheduler, 33).requires_grad_()
    point = scheduler(t)
    for value, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        # A constant alpha (variance-exploding paths) has no graph at all.
        expected = torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else 0 * t
        torch.testing.assert_close(derivative.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def test_derivatives_hold_up_to_finite_ends(scheduler: Scheduler) -> None:
    """At t_min (and t_max, where the velocity is finite there) d_alpha, d_sigma equal one-sided differences."""
    h = 1e-6
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
    domain = rf"\[0, {scheduler.t_max:.6g}\]"
    with pytest.raises(
        ValueError, match=rf"outside the domain {domain} of the .* scheduler; choose a time grid inside"
    ):
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


def test_the_inverse_of_the_angle_is_differentiable(scheduler: Scheduler) -> None:
    """dt/d(angle) = 1 / (d angle/dt): what a change of scheduler passes to learned times."""
    for t in inside(scheduler, 5):
        angle = scheduler.angle(t).requires_grad_()
        (found,) = torch.autograd.grad(scheduler.time_at_angle(angle), angle)
        assert float(found) == pytest.approx(1 / float(central_difference(scheduler.angle, float(t))), rel=1e-5)


# --- Paths of discrete networks -----------------------------------------------------------------------------------


def _table(scheduler: DiscreteVP) -> Tensor:
    """alphas_cumprod, computed as its definition says."""
    return torch.cumprod(1 - torch.tensor(scheduler.betas, dtype=torch.float64), dim=0)


LISTS = {"linear": linear_betas(), "scaled_linear": scaled_linear_betas()}


@pytest.mark.parametrize("schedule", LISTS)
def test_a_discrete_path_has_the_alphas_of_its_betas_at_the_training_timesteps(schedule: str) -> None:
    """alpha^2 at timestep k is prod_{i<=k} (1 - beta_i)."""
    scheduler = DiscreteVP(betas=LISTS[schedule])
    times = scheduler.time_of(torch.arange(1000))
    torch.testing.assert_close(scheduler(times).alpha ** 2, _table(scheduler), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("schedule", "start", "end"), [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_a_discrete_path_is_the_one_that_diffusers_trains_and_samples_on(
    schedule: str, start: float, end: float
) -> None:
    """The betas of diffusers' configuration of the same name; its table is float32."""
    theirs = DDIMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).alphas_cumprod.double()
    scheduler = DiscreteVP(betas=LISTS[schedule])
    torch.testing.assert_close(_table(scheduler), theirs, rtol=1e-4, atol=0)


def test_the_default_discrete_path_is_ddpms() -> None:
    """1000 betas from 1e-4 to 0.02; the noise left at timestep 0 is sqrt(beta_0), 0.01."""
    scheduler = DiscreteVP()
    assert (scheduler.timesteps, scheduler.betas) == (1000, linear_betas())
    assert float(scheduler.sigma(scheduler.t_max)) == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_a_discrete_path_runs_from_the_last_to_the_first_trained_timestep(count: int) -> None:
    """t = 0 is timestep N - 1 and t_max = 1 - 1/N is timestep 0: the network is asked nothing beyond."""
    scheduler = DiscreteVP(betas=linear_betas(count=count))
    assert (scheduler.t_min, scheduler.t_max) == (0.0, 1 - 1 / count)
    ends = torch.tensor([0.0, scheduler.t_max], dtype=torch.float64)
    assert scheduler.timestep(ends).tolist() == pytest.approx([count - 1, 0], abs=1e-9)


def test_the_networks_timestep_is_real_valued_between_the_trained_ones() -> None:
    """Half-way between timesteps 499 and 500 lies 499.5, and time_of goes back."""
    scheduler = DiscreteVP()
    between = (scheduler.time_of(499) + scheduler.time_of(500)) / 2
    assert float(scheduler.timestep(between)) == pytest.approx(499.5, abs=1e-9)
    assert float(scheduler.time_of(499.5)) == pytest.approx(float(between), abs=1e-15)


@pytest.mark.parametrize("schedule", LISTS)
def test_between_timesteps_alpha_is_that_of_a_linear_log_alpha(schedule: str) -> None:
    """The usual interpolation (piecewise linear in log alpha) agrees to 2e-6 where it has a value."""
    scheduler = DiscreteVP(betas=LISTS[schedule])
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), _table(scheduler).log() / 2])
    middle = (logs[1:-1] + logs[2:]) / 2
    found = scheduler(scheduler.time_of(torch.arange(999) + 0.5)).alpha
    torch.testing.assert_close(found, middle.exp(), rtol=0, atol=2e-6)


def test_the_slope_of_a_discrete_path_has_no_jumps_at_the_timesteps() -> None:
    """A kink at each of 1000 timesteps would cost an adaptive integrator its order."""
    scheduler = DiscreteVP()
    knots = scheduler.time_of(torch.arange(1, 999))
    before, after = (scheduler(knots + h).d_alpha for h in (1e-9, -1e-9))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=0)


def test_ddpms_discrete_path_is_close_to_the_continuous_one() -> None:
    """beta_max = 20, beta_min = 0.1 are N beta of the same list (Song et al. 2020): alpha differs by about 1/N."""
    times = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    torch.testing.assert_close(DiscreteVP()(times).alpha, VP()(times).alpha, rtol=0, atol=1e-3)


def test_zero_terminal_snr_starts_at_pure_noise() -> None:
    """alpha = 0 has no logarithm, but is a path like any other here (Lin et al. 2023, as diffusers rescales betas)."""
    theirs = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    products = theirs.alphas_cumprod.double()
    products[-1] = 0.0  # diffusers writes 2^-24 for the sake of its own divisions
    scheduler = DiscreteVP(alphas_cumprod=tuple(products.tolist()))
    point = scheduler(0.0)
    assert (float(point.alpha), float(point.sigma)) == (0.0, 1.0)
    assert all(math.isfinite(float(value)) for value in point)
    assert float(scheduler.time_at_angle(torch.tensor(0.0, dtype=torch.float64))) == 0.0
    times = torch.linspace(0, scheduler.t_max, 57, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_angle(scheduler.angle(times)), times, rtol=0, atol=1e-11)


def test_a_last_beta_of_1_is_zero_terminal_snr() -> None:
    scheduler = DiscreteVP(betas=(*linear_betas(count=9), 1.0))
    assert float(scheduler(0.0).alpha) == 0.0


def test_betas_and_their_products_define_the_same_path() -> None:
    """Either list of a diffusers configuration will do; as YAML gives lists, they are stored as tuples."""
    betas = linear_betas(count=50)
    products = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0).tolist()
    other = DiscreteVP(alphas_cumprod=products)
    assert isinstance(other.alphas_cumprod, tuple)
    times = inside(other)
    torch.testing.assert_close(DiscreteVP(betas=betas)(times).sigma, other(times).sigma, rtol=1e-10, atol=0)


def test_a_discrete_path_does_not_print_its_thousand_numbers() -> None:
    assert repr(DiscreteVP()) == "DiscreteVP(t_min=0.0, t_max=0.999)"


def test_a_wild_list_still_gives_a_rising_path() -> None:
    """Slopes are limited (Fritsch & Carlson 1980): a cubic through uneven betas could turn back otherwise."""
    scheduler = DiscreteVP(betas=(1e-6, 0.5, 1e-6, 1e-6, 0.9, 1e-5))
    angles = scheduler.angle(torch.linspace(0, scheduler.t_max, 2001, dtype=torch.float64))
    assert bool((angles.diff() > 0).all())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"betas": (0.1,)}, "betas must list at least 2 training timesteps, got 1"),
        ({"alphas_cumprod": (0.9,)}, "alphas_cumprod must list at least 2 training timesteps, got 1"),
        ({"betas": (0.1, 0.0)}, r"betas must lie strictly between 0 and 1 \(.*\), got 0 at timestep 1"),
        ({"betas": (1.0, 0.1)}, r"betas must lie strictly between 0 and 1 \(.*\), got 1 at timestep 0"),
        ({"alphas_cumprod": (0.1, 0.9)}, r"got 0\.9 at timestep 1 after 0\.1; list it from the data"),
        ({"alphas_cumprod": (0.9, -0.1)}, r"alphas_cumprod must fall strictly .*, got -0\.1 at timestep 1"),
        ({"betas": (0.1, 0.2), "alphas_cumprod": (0.9, 0.5)}, "takes betas or alphas_cumprod, not both; leave one out"),
        (
            {"t_max": 0.9995},
            r"t_max=0\.9995 lies beyond the last trained time, timestep 0, 0\.999, where the discrete_vp",
        ),
    ],
    ids=["short", "short products", "zero", "one", "rising", "negative", "both", "beyond"],
)
def test_lists_that_make_no_path_are_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DiscreteVP(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-0.1, 0.9999])
def test_a_time_without_a_trained_timestep_has_none(t: float) -> None:
    with pytest.raises(
        ValueError, match=rf"t={t} is outside the trained timesteps 0 to 999, times 0 to 0\.999; choose"
    ):
        DiscreteVP().timestep(t)


@pytest.mark.parametrize("timestep", [-1, 999.5])
def test_a_timestep_that_was_not_trained_has_no_time(timestep: float) -> None:
    with pytest.raises(ValueError, match=f"timestep {timestep} is outside the trained timesteps 0 to 999"):
        DiscreteVP().time_of(timestep)


# --- EDM ----------------------------------------------------------------------------------------------------------


def test_edm_noise_falls_linearly_from_sigma_max_to_sigma_min() -> None:
    """alpha = 1, sigma = sigma_max (1 - t), from 80 to 0.002: Karras et al. 2022 in our time."""
    scheduler = EDM()
    assert float(scheduler.sigma(0.0)) == 80.0
    assert float(scheduler.sigma(0.5)) == 40.0
    assert float(scheduler.sigma(scheduler.t_max)) == pytest.approx(0.002, rel=1e-9)
    assert float(scheduler(0.3).alpha) == 1.0


def test_edm_defaults_are_those_of_the_public_sampler() -> None:
    """The noise levels of diffusers' EDM sampler: its first is sigma_max, its last before 0 sigma_min."""
    reference = EDMEulerScheduler()
    reference.set_timesteps(5)
    ends = [float(EDM().sigma(t)) for t in (0.0, EDM().t_max)]
    assert ends == pytest.approx([float(reference.sigmas[0]), float(reference.sigmas[-2])], rel=1e-5)


def test_edm_without_a_least_noise_goes_down_to_the_data() -> None:
    """sigma_min = 0: the path ends at t = 1, where its velocity is finite."""
    scheduler = EDM(sigma_min=0.0)
    assert (scheduler.t_max, float(scheduler.sigma(1.0))) == (1.0, 0.0)
    scheduler.check_velocity_time(1.0)


def test_more_noise_than_edm_has_lies_before_its_start() -> None:
    """Where another path starts at pure noise, a change of scheduler has to begin at EDM's own first time."""
    assert float(EDM().time_at_angle(torch.tensor(0.0, dtype=torch.float64))) == -math.inf


@pytest.mark.parametrize(("low", "high"), [(-1.0, 80.0), (2.0, 1.0), (1.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_edm_noise_levels_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=rf"needs 0 <= sigma_min < sigma_max, got sigma_min={low}, sigma_max={high}"):
        EDM(sigma_min=low, sigma_max=high)


def test_edm_is_refused_below_its_least_noise() -> None:
    with pytest.raises(
        ValueError, match=r"t_max=0\.99999 lies beyond the time of sigma_min=0\.002, 0\.999975, where the"
    ):
        EDM(t_max=0.99999)


# --- Custom paths -------------------------------------------------------------------------------------------------


def _sine(t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * t)


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * t)


def test_a_custom_path_of_a_known_one_is_that_path() -> None:
    """sin and cos by autograd and bisection: the cosine scheduler, derivatives and inverse included."""
    custom, known = Custom(alpha_function=_sine, sigma_function=_cosine), Cosine()
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    for found, expected in zip(custom(times), known(times), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    angles = known.angle(times)
    torch.testing.assert_close(custom.time_at_angle(angles), known.time_at_angle(angles), rtol=0, atol=1e-14)


def test_a_custom_path_can_be_named_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """'module:function' strings are all that YAML can carry."""
    module = types.ModuleType("my_paths")
    module.sine, module.cosine = _sine, _cosine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_paths", module)
    named = Custom(alpha_function="my_paths:sine", sigma_function="my_paths:cosine")
    assert float(named(0.25).alpha) == float(Cosine()(0.25).alpha)
    assert dataclasses.replace(named, t_min=0.5).alpha_function == "my_paths:sine"


def test_a_custom_velocity_that_is_infinite_at_the_end_is_kept_from_being_asked() -> None:
    """sigma = sqrt(1 - t^2) ends vertically, which shows in its derivative."""
    custom = Custom(sigma_function=lambda t: torch.sqrt(1 - t**2))
    assert custom.velocity_is_singular_at_end
    with pytest.raises(ValueError, match="velocity of the custom scheduler is infinite at t=1"):
        custom.check_velocity_time(1.0)
    assert float(custom.time_at_angle(custom.angle(1.0))) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_custom_path_has_its_derivatives_where_no_gradients_are_recorded(mode: type) -> None:
    """Sampling runs without gradients; d_alpha and d_sigma are needed all the same."""
    with mode():
        point = Custom()(torch.tensor(0.3, dtype=torch.float64))
    assert [float(value) for value in point] == pytest.approx([0.3, 0.91, 1.0, -0.6])


def test_a_constant_needs_no_graph() -> None:
    """A variance-exploding path: alpha = 1 does not depend on t at all."""
    custom = Custom(alpha_function=torch.ones_like, sigma_function=lambda t: 3 - 3 * t)
    assert [float(value) for value in custom(0.5)] == [1.0, 1.5, 0.0, -3.0]


def test_a_custom_paths_derivatives_can_be_differentiated_again() -> None:
    """Learned times: d sigma'/dt of 1 - t^2 is -2, and in forward mode too."""
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert float(torch.autograd.grad(Custom()(t).d_sigma, t)[0]) == -2.0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t.detach(), torch.ones_like(t))
        assert float(torch.autograd.forward_ad.unpack_dual(Custom()(dual).d_sigma).tangent) == -2.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"alpha_function": "no_colon"}, r"'no_colon' names no function; write it as 'package\.module:function'"),
        ({"alpha_function": "no_such:f"}, r"'no_such:f' cannot be imported: No module .*; is its folder on PYTHONPATH"),
        ({"alpha_function": "math:no_such"}, "'math:no_such': the module 'math' has no 'no_such'"),
        ({"alpha_function": "math:pi"}, "'math:pi' is no function but float"),
        ({"sigma_function": 3.0}, r"sigma_function must be a function or 'module:function', got 3\.0"),
        (
            {"sigma_function": lambda t: 0.5},
            r"sigma_function must map a float64 tensor .* got float; for a constant, write",
        ),
        ({"sigma_function": lambda t: 1 - t.float()}, r"must map a float64 tensor .* got torch\.float32 \(257,\)"),
        (
            {"sigma_function": lambda t: 0.5 - t},
            r"sigma_function must be finite and not negative on \[0, 1\], got -0\.0039",
        ),
        (
            {"alpha_function": lambda t: 1 / t},
            r"alpha_function must be finite and not negative on \[0, 1\], got inf at t=0",
        ),
        (
            {"alpha_function": lambda t: 1 - t, "sigma_function": lambda t: t},
            r"must rise strictly with t, .* turn functions of the other direction round",
        ),
        ({"alpha_function": lambda t: t * (1 - t)}, "cannot both be 0 at the same end; one of them must be positive"),
    ],
    ids=["name", "module", "attribute", "value", "number", "constant", "float32", "negative", "inf", "falling", "zero"],
)
def test_functions_that_make_no_path_are_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Custom(**options)  # type: ignore[arg-type]


# --- Names, inverses and slopes -----------------------------------------------------------------------------------


def test_a_scheduler_is_found_by_its_module_name() -> None:
    assert named_scheduler("edm", {"sigma_max": 50.0}) == EDM(sigma_max=50.0)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("karras", {}, "there is no scheduler 'karras'; `bespoke list schedulers` shows those that exist"),
        ("base", {}, "there is no scheduler 'base'"),
        ("edm", {"rho": 7}, r"scheduler 'edm' refuses the options \{'rho': 7\}: .*unexpected keyword argument 'rho'"),
    ],
)
def test_a_scheduler_that_cannot_be_had_is_refused(name: str, options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        named_scheduler(name, options)


@pytest.mark.parametrize("target", [-1.0, 0.0, 1e-12, 0.3, 1.0, 2.0])
def test_an_inverse_is_found_to_rounding_and_stays_in_its_bracket(target: float) -> None:
    """f(x) = x^3: its slope vanishes at 0, where Newton's method alone crawls; beyond the ends the ends are given."""
    found = invert_increasing(lambda x: (x**3, 3 * x**2), torch.tensor(target, dtype=torch.float64), 0.0, 1.0)
    assert float(found) == pytest.approx(min(max(target, 0.0), 1.0) ** (1 / 3), abs=1e-10)


def test_the_inverse_of_no_number_is_no_number() -> None:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    assert math.isnan(float(invert_increasing(lambda x: (x, torch.ones_like(x)), nan, 0.0, 1.0)))


def test_slopes_of_a_quadratic_sequence_are_exact() -> None:
    """(k + 2)^2 has the slope 2 (k + 2), at both ends too."""
    k = torch.arange(2, 8, dtype=torch.float64)
    torch.testing.assert_close(limited_slopes(k**2), 2 * k)


def test_slopes_are_limited_by_the_smaller_neighbouring_difference() -> None:
    """Three times it at most, which keeps the cubic between the points rising, and never zero."""
    values = torch.tensor([0.0, 1.0, 1.001, 5.0, 5.5], dtype=torch.float64)
    steps, slopes = values.diff(), limited_slopes(values)
    assert bool((slopes > 0).all())
    for k, (left, right) in enumerate(itertools.pairwise(steps), start=1):
        assert float(slopes[k]) <= 3 * min(float(left), float(right)) + 1e-15
