"""Exponential integrators: exact weights, finite ends, and properties that only these families have."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import fine_rk4, gaussian, mixture, noise, relative_error
from scipy.integrate import quad
from torch import Tensor

from solvers.families._dpmpp import dpmpp_weights
from solvers.families._exponential import EndpointPrediction, exponential_moments, history_weights
from solvers.families.base import Family, GridSolver
from solvers.families.ddim import DDIM
from solvers.families.deis import DEIS, gauss_legendre, time_weights
from solvers.families.dpm_solver_2 import DPMSolver2
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.dpmpp_3m import DPMpp3M
from solvers.families.edm_heun import EDMHeun
from solvers.families.exponential_multistep import ExponentialMultistep
from solvers.families.exponential_rk import ExponentialRK
from solvers.families.ipndm import IPNDM
from solvers.families.unipc import UniPC
from solvers.field import CountingField, FunctionField
from solvers.grids import UNIFORM, Grid
from solvers.scale_time import Preconditioned
from solvers.schedulers import VP, CondOT, Cosine, DiscreteVP, Scheduler

PREDICTIONS: list[EndpointPrediction] = ["epsilon", "sample"]

#: Families whose coefficients depend on the path only through log-SNR.
BY_SNR: list[Family] = [
    DPMSolver2(),
    DPMpp2M(),
    DPMpp3M(),
    EDMHeun(),
    IPNDM(),
    UniPC(),
    *(ExponentialRK(order, prediction) for order in (2, 3) for prediction in PREDICTIONS),
    *(ExponentialMultistep(count, prediction) for count in (2, 3) for prediction in PREDICTIONS),
]
ALL_FAMILIES = [*BY_SNR, DEIS()]

by_label = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.label)
on_paths = pytest.mark.parametrize("path", [CondOT(), Cosine(), VP()], ids=lambda path: path.name)


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _mean(function: Callable[[float], float], first: float, last: float, sign: int) -> float:
    """Mean of ``function`` over [first, last] under the density e^(sign lambda), by adaptive quadrature."""
    anchor = last if sign > 0 else first

    def integral(g: Callable[[float], float]) -> float:
        return quad(lambda x: g(x) * math.exp(sign * (x - anchor)), first, last, epsabs=0, epsrel=1e-12)[0]

    return integral(function) / integral(lambda _: 1.0)


# --- Weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.0, 1e-9, 0.3, 0.999999, 1.0, 4.0, 60.0])
def test_moments_of_the_exponential_density_are_accurate_for_every_step(h: float) -> None:
    """E[v^k] under e^(-h v) equals 64-point quadrature, even at small h, where closed forms lose every digit."""
    nodes, weights = gauss_legendre(64)
    density = weights * torch.exp(-h * nodes)
    expected = torch.stack([(density * nodes**k).sum() for k in range(3)]) / density.sum()
    torch.testing.assert_close(exponential_moments(_tensor(h).squeeze(), 3), expected, rtol=2e-13, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_multistep_weights_integrate_polynomials_in_log_snr_exactly(prediction: EndpointPrediction, count: int) -> None:
    """sum_j w_j p(lambda_j) is the mean of p under e^-lambda (noise) or e^lambda (data), on uneven steps."""
    lambdas, end = _tensor(0.4, -0.5, -0.9)[:count], 1.3
    weights = history_weights(prediction, lambdas, _tensor(end).squeeze())
    sign = -1 if prediction == "epsilon" else 1
    for degree in range(count):
        expected = _mean(lambda x, degree=degree: x**degree, 0.4, end, sign)
        assert float(weights @ lambdas**degree) == pytest.approx(expected, rel=1e-11)


def test_noise_weights_have_a_finite_limit_at_clean_data() -> None:
    """At log-SNR = +inf the mean under e^-lambda is finite: the limit of ever longer steps."""
    lambdas = _tensor(0.4, -0.5, -0.9)
    infinite = history_weights("epsilon", lambdas, _tensor(math.inf).squeeze())
    long = history_weights("epsilon", lambdas, _tensor(60.0).squeeze())
    torch.testing.assert_close(infinite, long, rtol=1e-9, atol=0)


def test_data_prediction_is_held_constant_on_the_step_to_clean_data() -> None:
    """The mean of a polynomial under e^lambda up to +inf is infinite, so that step is DDIM's, as documented."""
    assert history_weights("sample", _tensor(0.4, -0.5, -0.9), _tensor(math.inf).squeeze()).tolist() == [1.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_at_pure_noise_has_zero_weight(prediction: EndpointPrediction) -> None:
    """Leaving it out is the limit of a node far back in log-SNR."""
    end = _tensor(1.3).squeeze()
    without = history_weights(prediction, _tensor(0.4, -0.5, -math.inf), end)
    far = history_weights(prediction, _tensor(0.4, -0.5, -1e8), end)
    torch.testing.assert_close(far, torch.cat([without, _tensor(0.0)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [CondOT(), Cosine(), VP(), DiscreteVP(), Preconditioned(base=DiscreteVP(), sigma0=2.0)],
    ids=lambda p: p.name,
)
@pytest.mark.parametrize("end", [0.7, 0.7003, 1.0], ids=["inside", "between_knots", "to_the_data"])
def test_deis_coefficients_match_the_papers_integrals(path: Scheduler, end: float) -> None:
    """Each weight is the integral of a Lagrange polynomial in t over sigma/alpha, to 1e-11, by quadrature in t.

    Steps to t = 1 are included, where VP's d(sigma/alpha)/dt is infinite, and paths that are smooth only between the
    timesteps of a network.
    """
    nodes = _tensor(0.5, 0.25, 0.02)
    t, t_next = nodes[0], torch.tensor(min(end, path.t_max), dtype=torch.float64)
    # The substitution t = t' - (t' - t) z^2 removes VP's square-root singularity at t = 1. The edges of the pieces
    # include all timesteps.
    knots = path.knots(float(t), float(t_next))
    even = torch.linspace(0, 1, 65, dtype=torch.float64)
    pieces = torch.cat([((t_next - knots) / (t_next - t)).sqrt(), even]).sort()[0]
    abscissae, gauss = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(24))
    width = pieces.diff()[:, None]
    z = (pieces[:-1, None] + width * (abscissae + 1) / 2).flatten()
    at = t_next - (t_next - t) * z**2
    point = path(at)
    density = (point.d_sigma * point.alpha - point.sigma * point.d_alpha) / point.alpha**2
    measure = (width * gauss / 2).flatten() * density * 2 * (t_next - t) * z
    lagrange = [
        math.prod([(at - other) / (node - other) for k, other in enumerate(nodes) if k != j])
        for j, node in enumerate(nodes)
    ]
    expected = torch.stack([(measure * basis).sum() for basis in lagrange]) / measure.sum()
    torch.testing.assert_close(time_weights(path, nodes, t_next), expected, rtol=0, atol=1e-11)


def test_dpmpp_3m_weighs_the_second_difference_by_half() -> None:
    """On data quadratic in log-SNR its correction to a linear fit is half the exact one, as in the reference code."""
    lambdas, end = _tensor(0.4, -0.5, -0.9), _tensor(1.3).squeeze()
    fractions, h = (lambdas - 0.4) / 0.9, _tensor(0.9).squeeze()
    published, exact = dpmpp_weights(3, fractions, h), history_weights("sample", lambdas, end)
    for degree, share in ((0, 1.0), (1, 1.0), (2, 0.5)):
        assert float(published @ fractions**degree) == pytest.approx(share * float(exact @ fractions**degree))


# --- Exactness of complete methods -------------------------------------------------------------------------------


def _polynomial_data(path: Scheduler, degree: int) -> FunctionField:
    """A field whose data prediction is lambda^degree for every state."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        point = path(t)
        data = path.lambda_(t) ** degree * torch.ones_like(x)
        return point.d_alpha * data + point.d_sigma * (x - point.alpha * data) / point.sigma

    return FunctionField(velocity, path)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exponential_runge_kutta_is_exact_for_data_polynomial_in_log_snr(order: int) -> None:
    """On three uneven steps ExpRK-k is exact to rounding for x1-hat = lambda^(k-1), and not for lambda^k."""
    path = CondOT(t_min=0.2, t_max=0.9)
    times = _tensor(0.2, 0.35, 0.7, 0.9)
    first, last = float(path.lambda_(0.2)), float(path.lambda_(0.9))

    def error(degree: int) -> float:
        # x'/sigma' = x/sigma + integral of lambda^degree e^lambda.
        integral = quad(lambda x: x**degree * math.exp(x), first, last, epsabs=0, epsrel=1e-13)[0]
        sample = ExponentialRK(order, "sample").integrate(_polynomial_data(path, degree), _tensor(0.8), times)
        return abs(float(sample) - 0.1 * (1.0 + integral))

    assert error(order - 1) < 1e-13
    assert error(order) > 1e-4


@pytest.mark.parametrize(
    "family", [ExponentialRK(1, p) for p in PREDICTIONS] + [ExponentialMultistep(1, p) for p in PREDICTIONS]
)
@on_paths
def test_every_method_with_one_prediction_equals_ddim(family: Family, path: Scheduler) -> None:
    """Order 1 and one step back equal DDIM for either prediction, including both ends of the path."""
    one_prediction, ddim = (GridSolver(method, 5, UNIFORM).to_ns(path) for method in (family, DDIM()))
    torch.testing.assert_close(one_prediction.flat(), ddim.flat(), rtol=1e-11, atol=1e-13)


def test_dpmpp_3m_with_three_steps_equals_dpmpp_2m() -> None:
    """The orders are 1, 2, 1: third order needs at least four steps."""
    three, two = (GridSolver(method, 3, UNIFORM).to_ns(VP()) for method in (DPMpp3M(), DPMpp2M()))
    torch.testing.assert_close(three.flat(), two.flat(), rtol=1e-12, atol=1e-14)


def test_unipc_corrects_every_state_but_the_last() -> None:
    """UniPC-1 in two steps on CondOT by hand: the first step averages two predictions, the last is a DDIM step."""
    theta = GridSolver(UniPC(1), 2, UNIFORM).to_ns(CondOT())
    # From pure noise <x1-hat> = (D_0 + D_1) / 2 with D_0 = x0 + u_0 and D_1 = g + u_1/2 at the guess g = x0 + u_0/2.
    # Corrected x = x0/2 + (D_0 + D_1)/4 = x0 + 3/8 u_0 + 1/8 u_1, and the last step goes to D_1 itself.
    assert theta.b[1].tolist() == pytest.approx([0.5, 0.0])
    assert theta.b[2].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exponential_multistep_of_three_has_second_order_in_the_limit(prediction: EndpointPrediction) -> None:
    """The h^2 error of its DDIM start dominates beyond about a thousand steps, so no order is declared."""
    path, x0 = CondOT(t_min=0.1, t_max=0.9), noise(8, 2)
    field = mixture().field(path)
    exact = fine_rk4(field, path.sigma(0.1) * x0, 0.1, 0.9, steps=800)
    family = ExponentialMultistep(3, prediction)
    errors = [float((GridSolver(family, n, UNIFORM).sample(field, x0) - exact).norm()) for n in (750, 1500)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.12)
    assert family.order is None


# --- Both ends ---------------------------------------------------------------------------------------------------


@by_label
@on_paths
def test_a_single_data_point_is_reached_exactly_with_any_steps(family: Family, path: Scheduler) -> None:
    """With a single data point both predictions are constant along a trajectory, and every mean of them is exact."""
    point = gaussian(mean=(0.7, -0.4), std=0.0)
    nfe = next(n for n in range(5, 9) if _affordable(family, n))
    sample = GridSolver(family, nfe, UNIFORM).sample(point.field(path), noise(5, 2))
    assert relative_error(sample, point.means.expand(5, 2)) < 1e-9


def _affordable(family: Family, nfe: int) -> bool:
    try:
        family.steps(nfe)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", BY_SNR, ids=lambda family: family.label)
def test_the_path_matters_only_through_the_snr_of_the_times(family: Family) -> None:
    """The same SNRs on CondOT and on cosine, from pure noise to clean data, give the same samples."""
    straight, curved = CondOT(), Cosine()
    times = Grid("warped", p=1.6, q=1.2).times(6, straight)
    matched = curved.time_at_angle(straight.angle(times))
    x0 = noise(5, 2)
    on_cond_ot = family.integrate(mixture().field(straight), x0, times)
    on_cosine = family.integrate(mixture().field(curved), x0, matched)
    assert relative_error(on_cosine, on_cond_ot) < 1e-9


def test_stages_of_infinite_steps_are_placed_in_a_finite_coordinate() -> None:
    """Half-way in alpha/sigma from pure noise, in log-SNR between finite ends, in sigma/alpha to clean data."""
    path = CondOT()
    times = GridSolver(DPMSolver2(), 6, UNIFORM).to_ns(path).times
    ratio = [float(path.lambda_(t).exp()) for t in times]
    # alpha/sigma = 0, 1/2, 2, inf at the grid's times 0, 1/3, 2/3, 1.
    assert ratio == pytest.approx([0.0, 0.25, 0.5, 1.0, 2.0, 4.0])


@pytest.mark.parametrize("family", [DPMSolver2(), ExponentialRK(2), ExponentialRK(3, "epsilon")], ids=lambda f: f.label)
def test_a_single_step_from_noise_to_data_has_its_stages_at_snr_c_over_1_minus_c(family: Family) -> None:
    """A step infinite at both ends has no midpoint in log-SNR: on CondOT its stages are at t = c."""
    stages = family.evaluations_per_step
    theta = GridSolver(family, stages, UNIFORM).to_ns(CondOT())
    assert theta.times.tolist() == pytest.approx([k / stages for k in range(stages)])


@pytest.mark.parametrize(
    "family", [ExponentialRK(2), ExponentialRK(2, "epsilon"), ExponentialRK(3), DPMSolver2()], ids=lambda f: f.label
)
def test_singlestep_methods_keep_their_order_over_infinite_steps(family: Family) -> None:
    """On all of CondOT, both ends included, errors fall nearly with the order.

    DDIM steps at the ends would limit the order to 2. Only the third-order method reveals that; the others would merely
    have the larger error of a first-order step.
    """
    field, x0 = mixture().field(CondOT()), noise(16, 2)
    exact = fine_rk4(field, x0, 0.0, 1.0, steps=400)
    nfes = [steps * family.evaluations_per_step for steps in (16, 64)]
    coarse, fine = (float((GridSolver(family, nfe, UNIFORM).sample(field, x0) - exact).norm()) for nfe in nfes)
    assert family.order is not None
    assert math.log2(coarse / fine) / 2 > family.order - 0.5


@pytest.mark.parametrize("family", [IPNDM(), ExponentialMultistep(3, "epsilon")], ids=lambda f: f.label)
def test_noise_is_extrapolated_accurately_near_pure_noise_in_float32(family: Family) -> None:
    """At a first step of 1e-5, alpha'/alpha = 1e4: the textbook form (alpha'/alpha) x + … would lose four digits."""
    exact, x0 = mixture().field(CondOT()), noise(64, 2)
    rounded = FunctionField(lambda x, t: exact(x.double(), t).to(x.dtype), CondOT())
    times = torch.cat([_tensor(0.0, 1e-5), torch.linspace(0.1, 1.0, 8, dtype=torch.float64)])
    double, single = (family.integrate(rounded, x, times) for x in (x0, x0.float()))
    assert single.dtype == torch.float32
    assert relative_error(single.double(), double) < 2e-6


# --- EDM Heun ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nfe", "steps"), [(1, 1), (3, 2), (7, 4)])
def test_edm_heun_makes_one_evaluation_fewer_than_two_per_step(nfe: int, steps: int) -> None:
    """2N - 1 evaluations, because the last step is Euler's."""
    field = CountingField(mixture().field(CondOT()))
    GridSolver(EDMHeun(), nfe, UNIFORM).sample(field, noise(2, 2))
    assert (field.nfe, EDMHeun().steps(nfe)) == (nfe, steps)


@pytest.mark.parametrize(("nfe", "remedy"), [(0, "use 1 or 3"), (8, "use 7 or 9")])
def test_edm_heun_rejects_an_even_nfe(nfe: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"EDM Heun makes 2N-1 evaluations in N steps, .* got {nfe}; {remedy}"):
        EDMHeun().steps(nfe)


def test_edm_heun_steps_in_sigma_over_alpha() -> None:
    """One Heun step from sigma/alpha = 3 to 1 on CondOT, then Euler to 0, by hand in EDM's coordinates."""
    path = CondOT(t_min=0.25)
    field, x0 = mixture().field(path), noise(3, 2)

    def slope(scaled: Tensor, sigma: float) -> Tensor:
        data, _ = mixture().endpoints(scaled / (1 + sigma), path(1 / (1 + sigma)))
        return (scaled - data) / sigma

    scaled = 3.0 * x0
    first = slope(scaled, 3.0)
    scaled = scaled - 2.0 * (first + slope(scaled - 2.0 * first, 1.0)) / 2
    expected = scaled - slope(scaled, 1.0)
    sample = EDMHeun().integrate(field, 0.75 * x0, _tensor(0.25, 0.5, 1.0))
    assert relative_error(sample, expected) < 1e-13


# --- Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialRK(4), "exponential_rk takes order from 1 to 3, got 4"),
        (lambda: ExponentialRK(2, "velocity"), "exponential_rk takes prediction 'epsilon' or 'sample', got 'velocity'"),
        (lambda: ExponentialMultistep(0), "exponential_multistep takes steps_back from 1 to 3, got 0"),
        (
            lambda: ExponentialMultistep(2, "x0"),
            "exponential_multistep takes prediction 'epsilon' or 'sample', got 'x0'",
        ),
        (lambda: UniPC(4), "unipc takes steps_back from 1 to 3, got 4"),
        (lambda: DEIS(0), "deis takes degree from 1 to 3, got 0"),
    ],
)
def test_an_unknown_option_is_rejected_with_the_valid_ones(build: Callable[[], Family], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
