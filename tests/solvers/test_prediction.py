"""Conversion of predictions to velocities, checked on data with closed-form posterior means."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import inside, mixture, noise

from solvers.field import per_sample
from solvers.prediction import (
    PREDICTIONS,
    PredictionField,
    endpoints,
    endpoints_from_velocity,
    velocity_coefficients,
)
from solvers.schedulers import VP, CondOT, Cosine, PathPoint, Scheduler

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def _is_variance_preserving(scheduler: Scheduler) -> bool:
    point = scheduler(0.5)
    return math.isclose(float(point.alpha**2 + point.sigma**2), 1.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_the_velocity_of_its_path(prediction: str, scheduler: Scheduler) -> None:
    """u = alpha' x1-hat + sigma' eps-hat from noise, data, v and velocity networks of the same data."""
    if prediction == "v_prediction" and not _is_variance_preserving(scheduler):
        pytest.skip("v-prediction is defined on variance-preserving paths")
    data, x = mixture(), noise(5, 2)
    field = PredictionField(data.network(prediction, scheduler), prediction, scheduler)
    assert field.scheduler == scheduler
    for t in inside(scheduler):
        torch.testing.assert_close(field(x, t), data.velocity(x, scheduler(t)), **ROUNDING)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("native", [VP(), Cosine()], ids=["vp", "cosine"])
def test_every_prediction_can_be_presented_under_another_scheduler(prediction: str, native: Scheduler) -> None:
    """The network runs at its native time and scale; the velocity is the analytic one on the new path."""
    data, x, target = mixture(), noise(5, 2), CondOT()
    field = PredictionField(data.network(prediction, native), prediction, native, target)
    for r in inside(field.scheduler):
        torch.testing.assert_close(field(x, r), data.velocity(x, target(r)), **ROUNDING)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_vp_networks_presented_as_cond_ot_are_finite_at_the_data_end(prediction: str) -> None:
    """At t=1 VP's own velocity is infinite, but under CondOT the same network gives the analytic x1-hat - eps-hat."""
    data, x, target = mixture(), noise(5, 2), CondOT()
    field = PredictionField(data.network(prediction, VP()), prediction, VP(), target)
    at_end = field(x, torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(at_end, data.velocity(x, target(1.0)), **ROUNDING)
    native = PredictionField(data.network(prediction, VP()), prediction, VP())
    with pytest.raises(ValueError, match="velocity of the vp scheduler is infinite at t=1"):
        native(x, torch.tensor(1.0, dtype=torch.float64))


def test_a_vp_network_presented_as_cond_ot_starts_at_its_lowest_snr() -> None:
    """CondOT is cut to the times whose SNR the network was trained on: r_0 = alpha_0 / (alpha_0 + sigma_0) > 0."""
    field = PredictionField(mixture().network("epsilon", VP()), "epsilon", VP(), CondOT())
    first = VP()(0.0)
    assert field.scheduler.t_min == pytest.approx(float(first.alpha / (first.alpha + first.sigma)), rel=1e-9)
    assert field.scheduler.t_max == 1.0
    with pytest.raises(ValueError, match=r"velocity queried at t=0, outside the domain \[0\.0065"):
        field(noise(1, 2), torch.tensor(0.0, dtype=torch.float64))


def test_a_network_is_queried_only_inside_its_own_domain() -> None:
    """Rounding in the inverse must not produce a network time outside [0, 1]."""
    times: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(float(t))
        return x

    field = PredictionField(network, "epsilon", VP(), CondOT())
    for r in torch.linspace(field.scheduler.t_min, 1, 50, dtype=torch.float64):
        field(noise(1, 2), r)
    assert 0.0 <= min(times) < 1e-9
    assert max(times) == 1.0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_coefficients_match_table_1(prediction: str, scheduler: Scheduler) -> None:
    """u = beta x + gamma f (BNS Table 1) agrees with the division-free form inside the domain."""
    if prediction == "v_prediction" and not _is_variance_preserving(scheduler):
        pytest.skip("v-prediction is defined on variance-preserving paths")
    data, x = mixture(), noise(5, 2)
    predict = data.network(prediction, scheduler)
    for t in inside(scheduler):
        beta, gamma = velocity_coefficients(prediction, scheduler(t))
        expected = PredictionField(predict, prediction, scheduler)(x, t)
        torch.testing.assert_close(beta * x + gamma * predict(x, t), expected, **ROUNDING)


def test_table_1_is_singular_at_an_end_of_the_domain() -> None:
    """epsilon at alpha=0 and sample at sigma=0 divide by zero, which is why endpoints are used instead."""
    assert not math.isfinite(float(velocity_coefficients("epsilon", CondOT()(0.0))[1]))
    assert not math.isfinite(float(velocity_coefficients("sample", CondOT()(1.0))[1]))


def test_endpoints_from_velocity_inverts_the_path(scheduler: Scheduler) -> None:
    """(x1, eps) is recovered from x = alpha x1 + sigma eps and u = alpha' x1 + sigma' eps."""
    x1, eps = noise(4, 3), noise(4, 3, seed=1)
    for t in inside(scheduler):
        point = scheduler(t)
        x, u = point.alpha * x1 + point.sigma * eps, point.d_alpha * x1 + point.d_sigma * eps
        recovered = endpoints_from_velocity(u, x, point)
        torch.testing.assert_close(recovered.data, x1, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(recovered.noise, eps, rtol=1e-9, atol=1e-9)


def test_velocity_keeps_the_precision_of_its_samples() -> None:
    """Schedules are float64, but a float32 (or half-precision) model gets and returns its own dtype."""
    dtypes: list[torch.dtype] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        dtypes.append(x.dtype)
        return torch.tanh(x)

    field = PredictionField(network, "epsilon", VP(), CondOT())
    assert field(noise(2, 3).float(), torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32
    assert dtypes == [torch.float32]


def test_an_unknown_prediction_is_rejected_with_the_choices() -> None:
    x = noise(1, 2)
    match = r"unknown prediction 'flow'; choose one of epsilon, sample, v_prediction, velocity, score, noise_minus_data"
    with pytest.raises(ValueError, match=match):
        endpoints("flow", x, x, CondOT()(0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=match):
        velocity_coefficients("flow", CondOT()(0.5))  # type: ignore[arg-type]


def test_v_prediction_is_rejected_off_the_unit_circle() -> None:
    """alpha eps - sigma x1 determines (x1, eps) only if alpha^2 + sigma^2 = 1."""
    x = noise(1, 2)
    with pytest.raises(ValueError, match=r"v_prediction needs alpha\^2 \+ sigma\^2 = 1, got 0\.5; use 'velocity'"):
        endpoints("v_prediction", x, x, CondOT()(0.5))


def test_a_v_prediction_at_a_learned_time_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    point: PathPoint = Cosine()(t)
    endpoints("v_prediction", noise(1, 2), noise(1, 2), point)
    assert [str(warning.message) for warning in recwarn] == []


def _network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network that accepts one time or one time per sample, like real models."""
    return torch.tanh(x * per_sample(1 + t, x))


@pytest.mark.parametrize("target", [None, CondOT()], ids=["native", "as cond_ot"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_per_sample_times_give_the_same_velocities_as_single_calls(
    prediction: str, target: Scheduler | None, scheduler: Scheduler
) -> None:
    """Solvers that share a batch use different times; every sample's velocity equals that of a call with a 0-d time.

    Schedulers with an iterative inverse stop iterating for all times at once, which may change the last bit.
    """
    if prediction == "v_prediction" and not _is_variance_preserving(scheduler):
        pytest.skip("v-prediction is defined on variance-preserving paths")
    field = PredictionField(_network, prediction, scheduler, target)
    times = inside(field.scheduler, 6)
    x = noise(6, 2, 3)
    alone = torch.stack([field(x, t)[i] for i, t in enumerate(times)])
    torch.testing.assert_close(field(x, times), alone, rtol=1e-12, atol=1e-13)


def test_noise_minus_data_is_the_negative_velocity_of_a_straight_path() -> None:
    """A rectified flow that counts s from the data, x = (1 - s) x1 + s eps, predicts dx/ds = eps - x1."""
    data, x = mixture(), noise(5, 2)
    network = data.network("noise_minus_data", CondOT())
    for t in inside(CondOT()):
        torch.testing.assert_close(network(x, t), -data.velocity(x, CondOT()(t)), **ROUNDING)


def test_the_score_is_the_gradient_of_the_log_density(scheduler: Scheduler) -> None:
    """-E[eps | x] / sigma, the closed form of the oracle, is what autograd finds for the mixture's density."""
    data = mixture()
    for t in inside(scheduler, 3):
        point, x = scheduler(t), noise(5, 2).requires_grad_()
        variance = point.alpha**2 * data.stds**2 + point.sigma**2
        distance = (x[:, None, :] - point.alpha * data.means).square().sum(-1)
        log_density = torch.logsumexp(data.weights.log() - variance.log() - distance / (2 * variance), dim=1)
        (gradient,) = torch.autograd.grad(log_density.sum(), x)
        torch.testing.assert_close(data.network("score", scheduler)(x.detach(), t), gradient, **ROUNDING)


@pytest.mark.parametrize(
    ("prediction", "t_singular"), [("epsilon", 0.0), ("sample", 1.0), ("score", 0.0), ("score", 1.0)]
)
def test_one_sample_at_a_singular_time_is_rejected(prediction: str, t_singular: float) -> None:
    """alpha = 0 or sigma = 0 for a single sample of a batch, where its prediction does not determine the velocity."""
    field = PredictionField(_network, prediction, CondOT())
    with pytest.raises(ValueError, match=rf"a prediction of '{prediction}' does not determine the"):
        field(noise(2, 3), torch.tensor([0.5, t_singular], dtype=torch.float64))
