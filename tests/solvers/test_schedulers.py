"""Schedulers: derivatives, inverses, the ends of the domain, and rejected input."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import sys
import types
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from oracles import all_schedulers, central_difference, inside
from torch import Tensor

from solvers.schedulers import EDM, VP, CondOT, Cosine, Custom, DiscreteVP, Scheduler
from solvers.schedulers._betas import cosine_betas, linear_betas, quadratic_betas, scaled_linear_betas
from solvers.schedulers._monotone import invert_increasing, limited_slopes
from solvers.schedulers._named import named_scheduler


def test_snr_rises_strictly_over_the_domain(scheduler: Scheduler) -> None:
    """BNS section 2: snr(t) is strictly increasing, which makes a change of scheduler possible."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 201, dtype=torch.float64)
    angles = scheduler.angle(times)
    assert bool((angles.diff() > 0).all())


def test_a_path_ends_at_t_1_if_and_only_if_it_reaches_the_data(scheduler: Scheduler) -> None:
    """snr(1) is infinite; a path for a network never trained on clean data ends earlier, at its last noise level."""
    end = float(scheduler.angle(scheduler.t_max))
    assert (scheduler.t_max == 1.0) == (end == pytest.approx(math.pi / 2, abs=1e-12))


@pytest.mark.parametrize(
    "path",
    [
        *(VP(beta_max=beta_max) for beta_max in (1.0, 20.0, 40.0, 70.0, 200.0, 1000.0)),
        EDM(sigma_min=1e-4, sigma_max=1e6),
        CondOT(),
        Cosine(),
        DiscreteVP(betas=(*linear_betas()[:-1], 1.0)),
    ],
    ids=lambda path: f"{path.name}-{getattr(path, 'beta_max', '')}",
)
def test_times_are_recovered_from_angles_at_the_noise_end(path: Scheduler) -> None:
    """The angle keeps alpha's digits however small it is, and its inverse must not cancel them."""
    times = path.t_min + (path.t_max - path.t_min) * torch.tensor(
        [0.0, 1e-9, 1e-3, 0.1, 0.5, 0.99], dtype=torch.float64
    )
    torch.testing.assert_close(path.time_at_angle(path.angle(times)), times, rtol=0, atol=2e-14)


def test_vp_maps_noise_beyond_its_path_to_times_before_it() -> None:
    """Pure noise (angle 0) too: a finite time, with finite derivatives on both branches of the formula."""
    angles = torch.tensor([0.0, 1e-300, 1e-3, 0.8, 1.5], dtype=torch.float64, requires_grad=True)
    times = VP().time_at_angle(angles)
    assert bool((times.diff() > 0).all() or times.diff()[0] == 0)
    assert bool(times.isfinite().all())
    assert float(times[0].detach()) < 0
    (slopes,) = torch.autograd.grad(times.sum(), angles)
    assert bool(slopes.isfinite().all())


def test_derivatives_match_autograd(scheduler: Scheduler) -> None:
    """d_alpha and d_sigma, written by hand, against autograd through alpha and sigma."""
    t = inside(scheduler, 33).requires_grad_()
    point = scheduler(t)
    for value, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        # A constant alpha (on variance-exploding paths) has no graph.
        expected = torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else 0 * t
        torch.testing.assert_close(derivative.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def test_derivatives_are_right_at_finite_ends(scheduler: Scheduler) -> None:
    """At t_min (and at t_max, if the velocity is finite there) d_alpha and d_sigma equal one-sided differences."""
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
    """time_at_angle(angle(t)) = t at both ends too, because the angle is finite even if log-SNR is not."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 101, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_angle(scheduler.angle(times)), times, rtol=0, atol=1e-11)


def test_time_at_lambda_inverts_log_snr_on_the_closed_domain(scheduler: Scheduler) -> None:
    """time_at_lambda(lambda_(t)) = t, even at an end where log-SNR is infinite."""
    times = torch.linspace(scheduler.t_min, scheduler.t_max, 101, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_lambda(scheduler.lambda_(times)), times, rtol=0, atol=1e-11)


def test_time_at_lambda_accepts_a_float() -> None:
    """Log-SNR 0 is alpha = sigma, the middle of both flow-matching paths."""
    assert float(CondOT().time_at_lambda(0.0)) == pytest.approx(0.5, abs=1e-15)
    assert float(Cosine().time_at_lambda(0.0)) == pytest.approx(0.5, abs=1e-15)


def test_schedules_are_computed_in_float64_for_any_input_dtype(scheduler: Scheduler) -> None:
    """A float32 time gives float64 alpha and sigma: schedules are scalars, so the precision is free."""
    point = scheduler(torch.tensor(0.5, dtype=torch.float32))
    assert {value.dtype for value in point} == {torch.float64}


def test_cond_ot_is_the_straight_line() -> None:
    """FM-OT: alpha = t, sigma = 1 - t."""
    alpha, sigma, d_alpha, d_sigma = (float(value) for value in CondOT()(0.3))
    assert (alpha, sigma, d_alpha, d_sigma) == (0.3, 0.7, 1.0, -1.0)


@pytest.mark.parametrize("scheduler", [Cosine(), VP()], ids=["cosine", "vp"])
def test_variance_preserving_paths_keep_alpha_squared_plus_sigma_squared_at_one(scheduler: Scheduler) -> None:
    """alpha^2 + sigma^2 = 1, the condition for v-prediction (BNS Table 1)."""
    point = scheduler(torch.linspace(0, 1, 33, dtype=torch.float64))
    torch.testing.assert_close(point.alpha**2 + point.sigma**2, torch.ones(33, dtype=torch.float64))


def test_cosine_ends_at_exactly_zero_noise() -> None:
    """sigma(1) is exactly 0, unlike cos(pi/2) in floating point."""
    assert float(Cosine().sigma(1.0)) == 0.0


def test_vp_starts_with_a_trace_of_data() -> None:
    """xi_1 = exp(-(20 - 0.1)/4 - 0.1/2) = 0.00657, not 0."""
    assert float(VP()(0.0).alpha) == pytest.approx(0.00657, abs=5e-6)
    assert float(VP()(1.0).sigma) == 0.0


@pytest.mark.parametrize("distance", ["1e-2", "1e-4", "1e-6", "1e-9", "1e-12"])
def test_vp_sigma_is_accurate_next_to_the_data(distance: str) -> None:
    """Against sqrt(1 - xi^2) with 60 decimal digits: expm1 keeps 12 correct digits, while 1 - xi^2 would keep none."""
    t = 1 - float(distance)
    with localcontext() as context:
        context.prec = 60
        s, b_max, b_min = 1 - Decimal(t), Decimal(VP().beta_max), Decimal(VP().beta_min)
        log_xi = -s * s * (b_max - b_min) / 4 - s * b_min / 2
        exact = float((1 - (2 * log_xi).exp()).sqrt())
    assert float(VP().sigma(t)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("t", [-0.01, 1.01, 7.0, float("nan"), float("inf")])
def test_a_time_outside_the_domain_is_rejected(scheduler: Scheduler, t: float) -> None:
    domain = rf"\[0, {scheduler.t_max:.6g}\]"
    with pytest.raises(
        ValueError, match=rf"outside the domain {domain} of the .* scheduler; choose a time grid inside"
    ):
        scheduler.check_velocity_time(t)


def test_rounding_at_the_ends_is_tolerated() -> None:
    """A grid that exceeds an end by rounding is not a user error."""
    CondOT().check_velocity_time(1 + 1e-12)
    CondOT().check_velocity_time(torch.tensor(-1e-12, dtype=torch.float64))
    with pytest.raises(ValueError, match="outside the domain"):
        CondOT().check_velocity_time(1 + 1e-6)


def test_a_cut_domain_rejects_times_outside_it() -> None:
    with pytest.raises(ValueError, match=r"t=0\.05, outside the domain \[0\.1, 0\.9\] of the cosine scheduler"):
        Cosine(t_min=0.1, t_max=0.9).check_velocity_time(0.05)


def test_vp_velocity_at_the_data_end_is_rejected_with_a_remedy() -> None:
    """sigma' is infinite at t=1; the message names the solvers and the scheduler that avoid this."""
    with pytest.raises(ValueError, match=r"velocity of the vp scheduler is infinite at t=1; .*cond_ot scheduler"):
        VP().check_velocity_time(1.0)
    VP().check_velocity_time(1 - 1e-6)


def test_vp_cut_before_the_data_can_be_queried_at_its_last_time() -> None:
    """The velocity is infinite only at t=1, not at the end of a domain that stops earlier."""
    VP(t_max=0.99).check_velocity_time(0.99)
    assert math.isfinite(float(VP(t_max=0.99)(0.99).d_sigma))


def test_velocity_is_singular_at_end_agrees_with_the_derivatives() -> None:
    """The flag is set exactly if d_sigma is not finite at t_max."""
    for scheduler in all_schedulers():
        finite = bool(torch.isfinite(scheduler(scheduler.t_max).d_sigma))
        assert scheduler.velocity_is_singular_at_end is not finite, scheduler.name


def test_a_time_that_carries_a_gradient_is_checked_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Learned times require gradients, and checking them must not warn at every training step."""
    CondOT().check_velocity_time(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(("t_min", "t_max"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_empty_or_overlong_domain_is_rejected(t_min: float, t_max: float) -> None:
    with pytest.raises(ValueError, match="domain must satisfy 0 <= t_min < t_max <= 1, got t_min="):
        CondOT(t_min=t_min, t_max=t_max)


def test_the_inverse_of_the_angle_is_differentiable(scheduler: Scheduler) -> None:
    """dt/d(angle) = 1 / (d angle/dt), the gradient that a change of scheduler passes to learned times."""
    for t in inside(scheduler, 5):
        angle = scheduler.angle(t).requires_grad_()
        (gradient,) = torch.autograd.grad(scheduler.time_at_angle(angle), angle)
        assert float(gradient) == pytest.approx(1 / float(central_difference(scheduler.angle, float(t))), rel=1e-5)


# --- Paths of discrete-time networks ------------------------------------------------------------------------------


def _table(scheduler: DiscreteVP) -> Tensor:
    """alphas_cumprod, computed by its definition."""
    return torch.cumprod(1 - torch.tensor(scheduler.betas, dtype=torch.float64), dim=0)


LISTS = {"linear": linear_betas(), "scaled_linear": scaled_linear_betas()}


@pytest.mark.parametrize("schedule", LISTS)
def test_a_discrete_path_has_the_alphas_of_its_betas_at_the_training_timesteps(schedule: str) -> None:
    """alpha^2 at timestep k is prod_{i<=k} (1 - beta_i)."""
    scheduler = DiscreteVP(betas=LISTS[schedule])
    times = scheduler.time_of(torch.arange(1000))
    torch.testing.assert_close(scheduler(times).alpha ** 2, _table(scheduler), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("schedule", "start", "end"), [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_a_discrete_path_matches_the_alphas_of_diffusers(schedule: str, start: float, end: float) -> None:
    """The betas of diffusers' configuration of the same name; its table is float32."""
    theirs = DDIMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).alphas_cumprod.double()
    scheduler = DiscreteVP(betas=LISTS[schedule])
    torch.testing.assert_close(_table(scheduler), theirs, rtol=1e-4, atol=0)


def test_the_default_discrete_path_is_that_of_ddpm() -> None:
    """1000 betas from 1e-4 to 0.02; the noise left at timestep 0 is sqrt(beta_0) = 0.01."""
    scheduler = DiscreteVP()
    assert (scheduler.timesteps, scheduler.betas) == (1000, linear_betas())
    assert float(scheduler.sigma(scheduler.t_max)) == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_a_discrete_path_runs_from_the_last_to_the_first_trained_timestep(count: int) -> None:
    """t = 0 is timestep N - 1 and t_max = 1 - 1/N is timestep 0, so the network is never queried beyond them."""
    scheduler = DiscreteVP(betas=linear_betas(count=count))
    assert (scheduler.t_min, scheduler.t_max) == (0.0, 1 - 1 / count)
    ends = torch.tensor([0.0, scheduler.t_max], dtype=torch.float64)
    assert scheduler.timestep(ends).tolist() == pytest.approx([count - 1, 0], abs=1e-9)


def test_timesteps_between_the_trained_ones_are_real_valued() -> None:
    """Half-way between timesteps 499 and 500 lies 499.5, and ``time_of`` is the inverse."""
    scheduler = DiscreteVP()
    between = (scheduler.time_of(499) + scheduler.time_of(500)) / 2
    assert float(scheduler.timestep(between)) == pytest.approx(499.5, abs=1e-9)
    assert float(scheduler.time_of(499.5)) == pytest.approx(float(between), abs=1e-15)


@pytest.mark.parametrize("schedule", LISTS)
def test_alpha_between_timesteps_is_close_to_linear_interpolation_of_log_alpha(schedule: str) -> None:
    """The usual interpolation, piecewise linear in log alpha, agrees to 2e-6 wherever it is defined."""
    scheduler = DiscreteVP(betas=LISTS[schedule])
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), _table(scheduler).log() / 2])
    middle = (logs[1:-1] + logs[2:]) / 2
    alphas = scheduler(scheduler.time_of(torch.arange(999) + 0.5)).alpha
    torch.testing.assert_close(alphas, middle.exp(), rtol=0, atol=2e-6)


def test_the_slope_of_a_discrete_path_is_continuous_at_the_timesteps() -> None:
    """A kink at each of 1000 timesteps would cost an adaptive integrator its order."""
    scheduler = DiscreteVP()
    knots = scheduler.time_of(torch.arange(1, 999))
    before, after = (scheduler(knots + h).d_alpha for h in (1e-9, -1e-9))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=0)


def test_ddpms_discrete_path_is_close_to_the_continuous_one() -> None:
    """beta_max = 20 and beta_min = 0.1 are N beta of the same list (Song et al. 2020): alpha differs by about 1/N."""
    times = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    torch.testing.assert_close(DiscreteVP()(times).alpha, VP()(times).alpha, rtol=0, atol=1e-3)


def test_zero_terminal_snr_starts_at_pure_noise() -> None:
    """alpha = 0 has no logarithm, but the path works (Lin et al. 2023, with betas rescaled as in diffusers)."""
    theirs = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    products = theirs.alphas_cumprod.double()
    products[-1] = 0.0  # diffusers stores 2^-24 to avoid dividing by zero
    scheduler = DiscreteVP(alphas_cumprod=tuple(products.tolist()))
    point = scheduler(0.0)
    assert (float(point.alpha), float(point.sigma)) == (0.0, 1.0)
    assert all(math.isfinite(float(value)) for value in point)
    assert float(scheduler.time_at_angle(torch.tensor(0.0, dtype=torch.float64))) == 0.0
    times = torch.linspace(0, scheduler.t_max, 57, dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_at_angle(scheduler.angle(times)), times, rtol=0, atol=1e-11)


def test_a_last_beta_of_1_gives_zero_terminal_snr() -> None:
    scheduler = DiscreteVP(betas=(*linear_betas(count=9), 1.0))
    assert float(scheduler(0.0).alpha) == 0.0


def test_betas_and_their_products_define_the_same_path() -> None:
    """Either list of a diffusers configuration works; YAML lists are stored as tuples."""
    betas = linear_betas(count=50)
    products = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0).tolist()
    other = DiscreteVP(alphas_cumprod=products)
    assert isinstance(other.alphas_cumprod, tuple)
    times = inside(other)
    torch.testing.assert_close(DiscreteVP(betas=betas)(times).sigma, other(times).sigma, rtol=1e-10, atol=0)


def test_the_repr_of_a_discrete_path_omits_its_betas() -> None:
    assert repr(DiscreteVP()) == "DiscreteVP(t_min=0.0, t_max=0.999, start_scale=None)"


def test_an_uneven_list_of_betas_still_gives_a_rising_path() -> None:
    """Slopes are limited (Fritsch & Carlson 1980); otherwise a cubic through uneven betas might not be monotone."""
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
def test_invalid_lists_are_rejected(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DiscreteVP(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-0.1, 0.9999])
def test_a_time_outside_the_trained_timesteps_is_rejected(t: float) -> None:
    with pytest.raises(
        ValueError, match=rf"t={t} is outside the trained timesteps 0 to 999, times 0 to 0\.999; choose"
    ):
        DiscreteVP().timestep(t)


@pytest.mark.parametrize("timestep", [-1, 999.5])
def test_an_untrained_timestep_is_rejected(timestep: float) -> None:
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


def test_edm_defaults_match_diffusers() -> None:
    """In diffusers' EDM sampler the first noise level is sigma_max and the last one before 0 is sigma_min."""
    reference = EDMEulerScheduler()
    reference.set_timesteps(5)
    ends = [float(EDM().sigma(t)) for t in (0.0, EDM().t_max)]
    assert ends == pytest.approx([float(reference.sigmas[0]), float(reference.sigmas[-2])], rel=1e-5)


def test_edm_with_sigma_min_zero_reaches_the_data() -> None:
    """The path ends at t = 1, where its velocity is finite."""
    scheduler = EDM(sigma_min=0.0)
    assert (scheduler.t_max, float(scheduler.sigma(1.0))) == (1.0, 0.0)
    scheduler.check_velocity_time(1.0)


def test_noise_above_sigma_max_maps_before_the_start_of_edm() -> None:
    """A change of scheduler from a path that starts at pure noise has to begin at EDM's own first time."""
    assert float(EDM().time_at_angle(torch.tensor(0.0, dtype=torch.float64))) == -math.inf


@pytest.mark.parametrize(("low", "high"), [(-1.0, 80.0), (2.0, 1.0), (1.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_edm_noise_levels_out_of_order_are_rejected(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=rf"needs 0 <= sigma_min < sigma_max, got sigma_min={low}, sigma_max={high}"):
        EDM(sigma_min=low, sigma_max=high)


def test_edm_rejects_a_t_max_beyond_sigma_min() -> None:
    with pytest.raises(
        ValueError, match=r"t_max=0\.99999 lies beyond the time of sigma_min=0\.002, 0\.999975, where the"
    ):
        EDM(t_max=0.99999)


# --- Custom paths -------------------------------------------------------------------------------------------------


def _sine(t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * t)


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * t)


def test_a_custom_path_with_known_functions_equals_the_known_scheduler() -> None:
    """sin and cos by autograd and bisection equal the cosine scheduler, including derivatives and inverse."""
    custom, known = Custom(alpha_function=_sine, sigma_function=_cosine), Cosine()
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    for value, expected in zip(custom(times), known(times), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    angles = known.angle(times)
    torch.testing.assert_close(custom.time_at_angle(angles), known.time_at_angle(angles), rtol=0, atol=1e-14)


def test_a_custom_path_can_be_named_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML can only hold 'module:function' strings."""
    module = types.ModuleType("my_paths")
    module.sine, module.cosine = _sine, _cosine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_paths", module)
    named = Custom(alpha_function="my_paths:sine", sigma_function="my_paths:cosine")
    assert float(named(0.25).alpha) == float(Cosine()(0.25).alpha)
    assert dataclasses.replace(named, t_min=0.5).alpha_function == "my_paths:sine"


def test_a_custom_velocity_that_is_infinite_at_the_end_is_rejected_there() -> None:
    """sigma = sqrt(1 - t^2) has an infinite slope at t = 1, which is detected from its derivative."""
    custom = Custom(sigma_function=lambda t: torch.sqrt(1 - t**2))
    assert custom.velocity_is_singular_at_end
    with pytest.raises(ValueError, match="velocity of the custom scheduler is infinite at t=1"):
        custom.check_velocity_time(1.0)
    assert float(custom.time_at_angle(custom.angle(1.0))) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_custom_path_has_derivatives_under_no_grad(mode: type) -> None:
    """Sampling runs without gradients but still needs d_alpha and d_sigma."""
    with mode():
        point = Custom()(torch.tensor(0.3, dtype=torch.float64))
    assert [float(value) for value in point] == pytest.approx([0.3, 0.91, 1.0, -0.6])


def test_a_constant_custom_function_is_supported() -> None:
    """On a variance-exploding path alpha = 1 does not depend on t, so it has no graph."""
    custom = Custom(alpha_function=torch.ones_like, sigma_function=lambda t: 3 - 3 * t)
    assert [float(value) for value in custom(0.5)] == [1.0, 1.5, 0.0, -3.0]


def test_the_derivatives_of_a_custom_path_are_differentiable() -> None:
    """For learned times: d sigma'/dt of 1 - t^2 is -2, in reverse and in forward mode."""
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert float(torch.autograd.grad(Custom()(t).d_sigma, t)[0]) == -2.0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t.detach(), torch.ones_like(t))
        assert float(torch.autograd.forward_ad.unpack_dual(Custom()(dual).d_sigma).tangent) == -2.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"alpha_function": "no_colon"},
            r"'no_colon' does not name a function; write it as 'package\.module:function'",
        ),
        ({"alpha_function": "no_such:f"}, r"'no_such:f' cannot be imported: No module .*; is its folder on PYTHONPATH"),
        ({"alpha_function": "math:no_such"}, "'math:no_such': the module 'math' has no 'no_such'"),
        ({"alpha_function": "math:pi"}, r"'math:pi' is not a function \(its type is float\)"),
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
            r"must rise strictly with t, .* reverse functions of the other direction",
        ),
        ({"alpha_function": lambda t: t * (1 - t)}, "cannot both be 0 at the same end; one of them must be positive"),
    ],
    ids=["name", "module", "attribute", "value", "number", "constant", "float32", "negative", "inf", "falling", "zero"],
)
def test_invalid_custom_functions_are_rejected(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Custom(**options)  # type: ignore[arg-type]


# --- Names, inverses and slopes -----------------------------------------------------------------------------------


def test_a_scheduler_is_looked_up_by_its_module_name() -> None:
    assert named_scheduler("edm", {"sigma_max": 50.0}) == EDM(sigma_max=50.0)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("karras", {}, "there is no scheduler 'karras'; `bespoke list schedulers` shows those that exist"),
        ("base", {}, "there is no scheduler 'base'"),
        ("edm", {"rho": 7}, r"scheduler 'edm' refuses the options \{'rho': 7\}: .*unexpected keyword argument 'rho'"),
    ],
)
def test_an_unknown_scheduler_or_option_is_rejected(name: str, options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        named_scheduler(name, options)


@pytest.mark.parametrize("target", [-1.0, 0.0, 1e-12, 0.3, 1.0, 2.0])
def test_an_inverse_is_accurate_to_rounding_and_clamped_to_its_bracket(target: float) -> None:
    """f(x) = x^3 has zero slope at 0, where Newton's method alone is slow; targets beyond the ends give the ends."""
    root = invert_increasing(lambda x: (x**3, 3 * x**2), torch.tensor(target, dtype=torch.float64), 0.0, 1.0)
    assert float(root) == pytest.approx(min(max(target, 0.0), 1.0) ** (1 / 3), abs=1e-10)


@pytest.mark.parametrize("guess", [None, 0.0, 0.3])
def test_an_infinite_or_huge_slope_does_not_stop_the_search(guess: float | None) -> None:
    """f(x) = cbrt(x) has an infinite slope at 0 and 1e100 near it, where Newton's step is zero far from the target."""
    target = torch.tensor([-1.0, -0.5, 0.0, 0.2, 1.0], dtype=torch.float64)

    def cube_root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sign() * x.abs() ** (1 / 3), x.abs() ** (-2 / 3) / 3

    start = None if guess is None else torch.full_like(target, guess)
    root = invert_increasing(cube_root, target, -1.0, 1.0, guess=start)
    torch.testing.assert_close(root, target**3, rtol=1e-10, atol=1e-15)
    at_infinite_slope = target[2].clone().requires_grad_()
    root = invert_increasing(cube_root, at_infinite_slope, -1.0, 1.0)
    assert (float(root.detach()), float(torch.autograd.grad(root, at_infinite_slope)[0])) == (0.0, 0.0)


def test_the_inverse_of_nan_is_nan() -> None:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    assert math.isnan(float(invert_increasing(lambda x: (x, torch.ones_like(x)), nan, 0.0, 1.0)))


def test_slopes_of_a_quadratic_sequence_are_exact() -> None:
    """(k + 2)^2 has the slope 2 (k + 2), even at both ends."""
    k = torch.arange(2, 8, dtype=torch.float64)
    torch.testing.assert_close(limited_slopes(k**2), 2 * k)


def test_slopes_are_limited_by_the_smaller_neighbouring_difference() -> None:
    """At most three times the difference, so the cubic between the points stays monotone, and never zero."""
    values = torch.tensor([0.0, 1.0, 1.001, 5.0, 5.5], dtype=torch.float64)
    steps, slopes = values.diff(), limited_slopes(values)
    assert bool((slopes > 0).all())
    for k, (left, right) in enumerate(itertools.pairwise(steps), start=1):
        assert float(slopes[k]) <= 3 * min(float(left), float(right)) + 1e-15


# --- betas by name ------------------------------------------------------------------------------------------------


def authors_cosine(count: int) -> list[float]:
    """The code of Nichol & Dhariwal, improved-diffusion: betas_for_alpha_bar."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "linear"}, np.linspace(1e-4, 0.02, 1000)),
        ({"schedule": "linear", "start": 0.001, "end": 0.3, "count": 40}, np.linspace(0.001, 0.3, 40)),
        ({"schedule": "scaled_linear"}, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
        ({"schedule": "quadratic", "start": 1e-4, "end": 0.5, "count": 50}, np.linspace(1e-2, 0.5**0.5, 50) ** 2),
        ({"schedule": "quadratic"}, np.linspace(1e-2, 0.02**0.5, 1000) ** 2),
        ({"schedule": "cosine", "count": 100}, authors_cosine(100)),
        ({"schedule": "cosine"}, authors_cosine(1000)),
    ],
)
def test_named_betas_are_those_of_the_authors(options: dict[str, Any], expected: Any) -> None:
    """To 1e-12, in float64."""
    scheduler = DiscreteVP(betas=options)
    np.testing.assert_allclose(scheduler.betas, np.asarray(expected), rtol=1e-12, atol=0)
    assert scheduler == DiscreteVP(betas=tuple(scheduler.betas or ()))
    assert scheduler.timesteps == options.get("count", 1000)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("linear", linear_betas()),
        ("scaled_linear", scaled_linear_betas(1e-4, 0.02)),
        ("squaredcos_cap_v2", cosine_betas()),
    ],
)
def test_named_betas_are_those_of_diffusers(name: str, ours: tuple[float, ...]) -> None:
    """diffusers rounds them to float32."""

    theirs = DDPMScheduler(beta_schedule=name).betas
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the schedule of betas must be one of linear, scaled_linear, quadratic, cosine, got None"),
        ({"schedule": "sigmoid"}, r"the schedule of betas must be one of .*, got 'sigmoid'"),
        (
            {"schedule": "linear", "stop": 1},
            r"betas has no option 'stop'; its options are: schedule, start, end, count",
        ),
        ({"schedule": "linear", "count": 1}, r"the count of betas must be a whole number of timesteps, at least 2"),
        ({"schedule": "linear", "end": 1.5}, r"the end of betas must lie between 0 and 1, got 1\.5"),
        ({"schedule": "cosine", "start": 1e-4}, r"the cosine schedule of betas has no start and no end; leave them"),
    ],
)
def test_invalid_names_of_betas_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscreteVP(betas=options)


def test_quadratic_betas_are_scaled_linear_ones_with_other_ends() -> None:
    """Two names of one formula, each with the values of its authors."""
    assert quadratic_betas(0.00085, 0.012) == scaled_linear_betas()


def test_a_custom_path_is_unpickled_before_its_functions_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray hands schedulers from one process to another; the folder of the user's code is searched later."""
    (tmp_path / "path_of_a_user.py").write_text("def alpha(t): return t\n\ndef sigma(t): return 1 - t\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        path = Custom(alpha_function="path_of_a_user:alpha", sigma_function="path_of_a_user:sigma")
        data = pickle.dumps(path)
    monkeypatch.delitem(sys.modules, "path_of_a_user")
    arrived = pickle.loads(data)
    assert arrived == path
    monkeypatch.syspath_prepend(tmp_path)
    assert float(arrived.sigma(0.25)) == 0.75
