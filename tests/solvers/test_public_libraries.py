"""Each family compared with a public library's implementation, on the same grid and the same network.

Some of diffusers' schedulers step in float32 for any input, which limits the agreement to 1e-5. The others step in
float64 once their sigmas are float64, as torchdiffeq does. If diffusers starts or ends differently from a family, the
test compares the common part, and the family's docstring states the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from oracles import mixture, noise, nonlinear_field, relative_error
from torch import Tensor
from torchdiffeq import odeint

from solvers.families.base import ButcherTableau, Family, GridSolver, RungeKutta
from solvers.families.ddim import DDIM
from solvers.families.dpm_solver_2 import DPMSolver2
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.dpmpp_3m import DPMpp3M
from solvers.families.edm_heun import EDMHeun
from solvers.families.euler import Euler
from solvers.families.exponential_multistep import ExponentialMultistep
from solvers.families.exponential_rk import ExponentialRK
from solvers.families.heun import Heun
from solvers.families.ipndm import IPNDM
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.families.unipc import UniPC
from solvers.grids import UNIFORM, Grid
from solvers.prediction import PredictionField
from solvers.schedulers import VP, CondOT, Cosine, PathPoint

TRAIN_STEPS = 1000

# diffusers passes a tensor to NumPy 2 through a deprecated protocol, which cannot be fixed here.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def _time_of(timestep: int) -> float:
    """diffusers' timestep k as our t: k = 999 is t = 0, k = 0 is the last time before the data, which is t = 1."""
    return 1 - (timestep + 1) / TRAIN_STEPS


def _vp_alphas_cumprod() -> Tensor:
    """alpha_t^2 of our VP path at diffusers' timesteps."""
    times = torch.tensor([_time_of(k) for k in range(TRAIN_STEPS)], dtype=torch.float64)
    return VP()(times).alpha ** 2


def _vp_betas() -> np.ndarray:
    cumulative = _vp_alphas_cumprod().numpy()
    return 1 - cumulative / np.concatenate([[1.0], cumulative[:-1]])


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_diffusers(prediction: str, steps: int) -> None:
    """'trailing' timesteps are our uniform grid on VP, and the last step ends at alpha = 1, our t = 1. In float64."""
    reference = DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=_vp_betas(),
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    # diffusers multiplies the betas in float32, but the path is defined by the exact product.
    reference.alphas_cumprod = _vp_alphas_cumprod()
    reference.set_timesteps(steps)
    network, x0 = mixture().network(prediction, VP()), noise(6, 2)
    expected = VP().sigma(0.0) * x0
    for k in reference.timesteps.tolist():
        output = network(expected, torch.tensor(_time_of(k), dtype=torch.float64))
        expected = reference.step(output, k, expected).prev_sample
    sample = GridSolver(DDIM(), steps, UNIFORM).sample(PredictionField(network, prediction, VP()), x0)
    assert relative_error(sample, expected) < 1e-9


@pytest.mark.parametrize(
    ("steps", "final"), [(3, "zero"), (8, "zero"), (20, "zero"), (3, "sigma_min"), (8, "sigma_min")]
)
def test_dpmpp_2m_equals_diffusers_on_a_noise_prediction(steps: int, final: str) -> None:
    """DPM-Solver++(2M), midpoint form, to sigma = 0 or to the last trained time, with a first-order last step.

    Below 15 steps diffusers takes that last step for either final sigma ('lower_order_final'), as we do with 'always'.
    """
    reference = DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=_vp_betas(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type=final,
    )
    reference.alphas_cumprod = _vp_alphas_cumprod()
    reference.set_timesteps(steps)
    network, x0 = mixture().network("epsilon", VP()), noise(6, 2)
    expected = VP().sigma(0.0) * x0
    for k in reference.timesteps:
        output = network(expected, torch.tensor(_time_of(int(k)), dtype=torch.float64))
        expected = reference.step(output, k, expected).prev_sample.double()
    times = [*(_time_of(k) for k in reference.timesteps.tolist()), 1.0 if final == "zero" else _time_of(0)]
    field = PredictionField(network, "epsilon", VP())
    family = DPMpp2M(lower_order_final="always")
    sample = family.integrate(field, VP().sigma(0.0) * x0, torch.tensor(times, dtype=torch.float64))
    assert relative_error(sample, expected) < 1e-5


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_dpmpp_2m_equals_diffusers_on_a_flow(steps: int) -> None:
    """With flow sigmas alpha = 1 - sigma and the network returns -u; times are 1 - sigma, starting at 0.001."""
    reference = DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )
    reference.set_timesteps(steps)
    times = 1 - reference.sigmas.double()
    field, x0 = mixture().field(CondOT()), noise(6, 2)
    expected = x0
    for k, t in zip(reference.timesteps, times[:-1], strict=True):
        expected = reference.step(-field(expected, t), k, expected).prev_sample.double()
    assert relative_error(DPMpp2M().integrate(field, x0, times), expected) < 1e-5


# --- Exponential integrators on the grid of a diffusion model's sigmas ----------------------------------------


def _times_of(sigmas: Tensor) -> Tensor:
    """diffusers' sigmas, which are sigma/alpha, as times on our VP path; sigma = 0 is t = 1."""
    times = VP().time_at_lambda(-torch.log(sigmas.double()))
    return torch.where(sigmas == 0, 1.0, times)


def _diffusers_samples(reference: Any, prediction: str, x: Tensor) -> Tensor:
    """Samples of a diffusers scheduler on the VP path, starting from ``x``."""
    network = mixture().network(prediction, VP())
    for k, t in zip(reference.timesteps, _times_of(reference.sigmas)[:-1], strict=True):
        x = reference.step(network(x, t), k, x).prev_sample.double()
    return x


def _difference(family: Family, times: Tensor, prediction: str, x: Tensor, expected: Tensor) -> float:
    field = PredictionField(mixture().network(prediction, VP()), prediction, VP())
    return relative_error(family.integrate(field, x, times), expected)


def _vp_reference(scheduler: Callable[..., Any], steps: int, **options: Any) -> Any:
    """A diffusers scheduler on the VP path with float64 sigmas, with which most schedulers step in float64."""
    reference = scheduler(num_train_timesteps=TRAIN_STEPS, trained_betas=_vp_betas(), **options)
    reference.alphas_cumprod = _vp_alphas_cumprod()
    reference.set_timesteps(steps)
    if hasattr(reference, "sigmas"):
        # The first sigma, rounded to float32, would otherwise lie before t = 0.
        point = VP()(_times_of(reference.sigmas).clamp(min=0.0))
        reference.sigmas = point.sigma / point.alpha
    return reference


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [3, 5, 14])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_dpmpp_3m_equals_diffusers(prediction: str, steps: int, final: str) -> None:
    """DPM-Solver++(3M) with orders 1, 2, 3, …, 3, 2, 1, which diffusers uses below 15 steps, and we with 'always'."""
    reference = _vp_reference(
        DPMSolverMultistepScheduler,
        steps,
        algorithm_type="dpmsolver++",
        solver_order=3,
        prediction_type=prediction,
        timestep_spacing="trailing",
        final_sigmas_type=final,
    )
    x = noise(6, 2)
    times = _times_of(reference.sigmas)
    family = DPMpp3M(lower_order_final="always")
    assert _difference(family, times, prediction, x, _diffusers_samples(reference, prediction, x)) < 1e-5


@pytest.mark.parametrize("steps", [3, 5, 9, 10, 16])
@pytest.mark.parametrize("family", [DPMpp2M(), DPMpp3M()], ids=lambda family: family.label)
def test_dpmpp_multistep_lowers_its_last_order_as_the_authors_code_does(family: Any, steps: int) -> None:
    """dpm_solver_pytorch.py: order min(p, steps left) at the end of fewer than 10 steps only; compared in diffusers'
    implementation of the update, whose own rule counts 15 steps, with 'lower_order_final' set by the authors' rule."""
    reference = _vp_reference(
        DPMSolverMultistepScheduler,
        steps,
        algorithm_type="dpmsolver++",
        solver_order=family.highest,
        prediction_type="sample",
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
        lower_order_final=steps < 10,
    )
    reference.sigmas = torch.exp(torch.linspace(5.0, -4.0, steps + 1, dtype=torch.float64))
    x = noise(6, 2)
    times, expected = _times_of(reference.sigmas), _diffusers_samples(reference, "sample", x)
    assert _difference(family, times, "sample", x, expected) < 1e-5
    other = type(family)(lower_order_final="never" if steps < 10 else "always")
    assert _difference(other, times, "sample", x, expected) > 1e-4


@pytest.mark.parametrize("steps", [3, 8, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_exponential_multistep_of_order_2_equals_diffusers_heun_type(prediction: str, steps: int) -> None:
    """solver_type 'heun' integrates exactly: DPM-Solver(2M) is our 'epsilon', DPM-Solver++(2M) our 'sample'.

    Compared down to sigma > 0 and without diffusers' first-order last step, which this family does not take.
    """
    reference = _vp_reference(
        DPMSolverMultistepScheduler,
        steps,
        algorithm_type={"epsilon": "dpmsolver", "sample": "dpmsolver++"}[prediction],
        solver_order=2,
        solver_type="heun",
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    x, family = noise(6, 2), ExponentialMultistep(2, prediction)
    times = _times_of(reference.sigmas)
    assert _difference(family, times, "epsilon", x, _diffusers_samples(reference, "epsilon", x)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_exponential_multistep_of_noise_equals_diffusers_deis(prediction: str, order: int) -> None:
    """diffusers' DEIS extrapolates in log(sigma/alpha), so it is our exponential multistep and not our tAB-DEIS.

    Compared without its lower orders at the end ('lower_order_final').
    """
    reference = _vp_reference(
        DEISMultistepScheduler,
        9,
        solver_order=order,
        prediction_type=prediction,
        timestep_spacing="trailing",
        lower_order_final=False,
    )
    # The closed forms of diffusers need sigma > 0 at the end.
    reference.sigmas[-1] = reference.sigmas[-2] / 3
    x, family = noise(6, 2), ExponentialMultistep(order, "epsilon")
    times = _times_of(reference.sigmas)
    assert _difference(family, times, prediction, x, _diffusers_samples(reference, prediction, x)) < 1e-9


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers(order: int, steps: int, final: str) -> None:
    """UniPC-p, bh2, with lower orders at both ends and no corrector after the last step; in float64."""
    reference = _vp_reference(
        UniPCMultistepScheduler,
        steps,
        solver_order=order,
        solver_type="bh2",
        timestep_spacing="trailing",
        final_sigmas_type=final,
    )
    x = noise(6, 2)
    times = _times_of(reference.sigmas)
    assert _difference(UniPC(order), times, "epsilon", x, _diffusers_samples(reference, "epsilon", x)) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers_on_a_flow(order: int) -> None:
    """On flow sigmas alpha = 1 - sigma; diffusers starts at t = 1e-6 because log-SNR is infinite at 0."""
    reference = UniPCMultistepScheduler(
        solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    reference.set_timesteps(8)
    reference.sigmas = reference.sigmas.double()
    times = 1 - reference.sigmas
    field, x0 = mixture().field(CondOT()), noise(6, 2)
    expected = x0
    for k, t in zip(reference.timesteps, times[:-1], strict=True):
        expected = reference.step(-field(expected, t), k, expected).prev_sample
    assert relative_error(UniPC(order).integrate(field, x0, times), expected) < 1e-7


@pytest.mark.parametrize(
    ("family", "algorithm", "solver_type"),
    [
        (DPMSolver2(), "dpmsolver", "midpoint"),
        (ExponentialRK(2, "epsilon"), "dpmsolver", "heun"),
        (ExponentialRK(3, "epsilon"), "dpmsolver", "heun"),
        (ExponentialRK(2, "sample"), "dpmsolver++", "heun"),
        (ExponentialRK(3, "sample"), "dpmsolver++", "heun"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_exponential_runge_kutta_equals_diffusers_singlestep(family: Family, algorithm: str, solver_type: str) -> None:
    """diffusers counts each stage as a step: with sigmas uniform in log, its grid contains our stages. In float64.

    Compared down to sigma > 0. To sigma = 0 diffusers takes a DDIM step, while ours keeps its order.
    """
    stages, steps = family.evaluations_per_step, 4
    reference = _vp_reference(
        DPMSolverSinglestepScheduler,
        stages * steps,
        algorithm_type=algorithm,
        solver_order=stages,
        solver_type=solver_type,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    reference.sigmas = torch.exp(torch.linspace(3.0, -4.0, stages * steps + 1, dtype=torch.float64))
    x = noise(6, 2)
    times = _times_of(reference.sigmas)[::stages]
    assert _difference(family, times, "epsilon", x, _diffusers_samples(reference, "epsilon", x)) < 1e-9


def test_ipndm_equals_diffusers_plms_after_its_first_step() -> None:
    """diffusers' PNDM makes two evaluations in its first step; with ours (DDIM's) instead, all later steps agree."""
    steps = 10
    reference = _vp_reference(
        PNDMScheduler, steps, skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    network, x0 = mixture().network("epsilon", VP()), noise(6, 2)
    width = TRAIN_STEPS // steps
    timesteps = list(range(TRAIN_STEPS - 1, -1, -width))
    first = network(x0, torch.tensor(_time_of(timesteps[0]), dtype=torch.float64))
    expected = reference._get_prev_sample(x0, timesteps[0], timesteps[1], first)
    reference.ets, reference.counter = [first], 2
    for k in timesteps[1:]:
        output = network(expected, torch.tensor(_time_of(k), dtype=torch.float64))
        expected = reference.step(output, k, expected).prev_sample
    times = torch.tensor([*(_time_of(k) for k in timesteps), 1.0], dtype=torch.float64)
    assert _difference(IPNDM(), times, "epsilon", x0, expected) < 1e-9


def test_ipndm_equals_diffusers_ipndm() -> None:
    """IPNDMScheduler runs a v-prediction network on the cosine path, here from alpha > 0 as it divides by alpha."""
    angles = torch.linspace(1.5, 0.0, 9, dtype=torch.float64)
    reference = IPNDMScheduler(trained_betas=torch.sin(angles).tolist())
    reference.set_timesteps(8)
    reference.betas, reference.alphas = torch.sin(angles), torch.cos(angles)
    network, x0 = mixture().network("v_prediction", Cosine()), noise(6, 2)
    times = 1 - 2 * angles / torch.pi
    expected = x0
    for k, t in zip(reference.timesteps, times[:-1], strict=True):
        expected = reference.step(network(expected, t), k, expected).prev_sample
    field = PredictionField(network, "v_prediction", Cosine())
    assert relative_error(IPNDM().integrate(field, x0, times), expected) < 1e-9


# --- Samplers on the variance-exploding path: x / alpha against sigma / alpha ------------------------------------


def _from_edm(family: Family, sigmas: Tensor, x: Tensor) -> Tensor:
    """Run ``family`` on the VP path at the given sigma/alpha, from the EDM state ``x``; it ends at alpha = 1."""
    times = _times_of(sigmas)
    return family.integrate(mixture().field(VP()), VP()(times[0]).alpha * x, times)


def _denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser D(x; sigma) of the mixture."""
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    return mixture().endpoints(x, PathPoint(one, sigma, zero, -one))[0]


@pytest.mark.parametrize("spacing", [{"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_edm_heun_equals_diffusers(steps: int, spacing: dict[str, Any]) -> None:
    """HeunDiscreteScheduler: Heun in sigma with an Euler step to sigma = 0, 2N-1 evaluations; in float64."""
    reference = _vp_reference(HeunDiscreteScheduler, steps, **spacing)
    assert len(reference.timesteps) == 2 * steps - 1
    assert EDMHeun().steps(len(reference.timesteps)) == steps
    grid = torch.cat([reference.sigmas[:1], reference.sigmas[1:-1:2], reference.sigmas[-1:]])
    sigmas = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2)])
    start = grid[0] * noise(6, 2)
    expected = start
    for k, sigma in zip(reference.timesteps, sigmas, strict=True):
        epsilon = (expected - _denoised(expected, sigma)) / sigma
        expected = reference.step(epsilon, k, expected).prev_sample
    assert relative_error(_from_edm(EDMHeun(), grid, start), expected) < 1e-9


@pytest.mark.parametrize("spacing", [{"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}], ids=str)
def test_ddim_equals_diffusers_euler_in_sigma(spacing: dict[str, Any]) -> None:
    """EulerDiscreteScheduler is Euler's method for x/alpha as a function of sigma/alpha, i.e. DDIM; in float32."""
    reference = _vp_reference(EulerDiscreteScheduler, 8, **spacing)
    start = reference.sigmas[0].double() * noise(6, 2)
    expected = start
    for k, sigma in zip(reference.timesteps, reference.sigmas[:-1].double(), strict=True):
        reference.scale_model_input(expected, k)
        expected = reference.step((expected - _denoised(expected, sigma)) / sigma, k, expected).prev_sample.double()
    assert relative_error(_from_edm(DDIM(), reference.sigmas, start), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "scheduler", "options"),
    [
        (DDIM(), EDMEulerScheduler, {}),
        (DPMpp2M(), EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
        (DPMpp3M(lower_order_final="always"), EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
    ],
    ids=lambda value: value.label if isinstance(value, Family) else "",
)
def test_exponential_integrators_equal_diffusers_edm_samplers(
    family: Family, scheduler: Callable[..., Any], options: dict[str, Any]
) -> None:
    """EDM's preconditioned network on its own sigmas, 80 to 0.002 and then 0: equal SNRs give equal samples."""
    reference = scheduler(prediction_type="epsilon", **options)
    reference.set_timesteps(10)
    sigmas, data = reference.sigmas.double(), reference.config.sigma_data
    start = sigmas[0] * noise(6, 2)
    expected = start
    for k, sigma in zip(reference.timesteps, sigmas[:-1], strict=True):
        reference.scale_model_input(expected, k)
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
        network = (_denoised(expected, sigma) - skip * expected) / out
        expected = reference.step(network, k, expected).prev_sample.double()
    assert relative_error(_from_edm(family, sigmas, start), expected) < 1e-5


# --- Samplers for flows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers_flow_matching_sampler(shift: float) -> None:
    """FlowMatchEulerDiscreteScheduler steps -u in sigma = 1 - t; a shift changes only its grid."""
    steps = 8
    reference = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=shift)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    times = 1 - reference.sigmas.double()
    field, x0 = mixture().field(CondOT()), noise(6, 2)
    expected = x0
    for k, t in zip(reference.timesteps, times[:-1], strict=True):
        expected = reference.step(-field(expected, t), k, expected).prev_sample.double()
    assert relative_error(Euler().integrate(field, x0, times), expected) < 1e-5
    if shift == 1.0:
        assert relative_error(GridSolver(Euler(), steps, UNIFORM).sample(field, x0), expected) < 1e-5


class _ThreeEighths(RungeKutta):
    """Kutta's 3/8 rule, the method that torchdiffeq calls 'rk4'."""

    source = "Kutta 1901"
    label = "3/8"
    order = 4
    tableau: ClassVar[ButcherTableau] = ButcherTableau(
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8), c=(0.0, 1 / 3, 2 / 3, 1.0)
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [(Euler(), "euler"), (Midpoint(), "midpoint"), (Heun(), "heun2"), (_ThreeEighths(), "rk4")],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_runge_kutta_equals_torchdiffeq_on_a_fixed_grid(family: Family, method: str) -> None:
    """The same grid in float64. torchdiffeq's rk4 is the 3/8 rule, so it is compared with that tableau."""
    field, x0 = nonlinear_field(CondOT()), noise(6, 3)
    times = Grid("warped", p=1.6, q=1.2).times(6, CondOT())
    expected = odeint(lambda t, x: field(x, t), x0, times, method=method)[-1]
    assert relative_error(family.integrate(field, x0, times), expected) < 1e-12


def test_classical_rk4_differs_from_torchdiffeqs_rk4() -> None:
    """They differ on a coarse grid and agree in the limit, since both are of fourth order."""
    field, x0 = nonlinear_field(CondOT()), noise(6, 3)
    differences = []
    for steps in (4, 64):
        times = UNIFORM.times(steps, CondOT())
        theirs = odeint(lambda t, x: field(x, t), x0, times, method="rk4")[-1]
        differences.append(relative_error(RK4().integrate(field, x0, times), theirs))
    assert differences[0] > 1e-5
    assert differences[1] < differences[0] / 16**3
