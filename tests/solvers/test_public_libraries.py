"""Each family against the public library's implementation, on the same grid and the same network.

diffusers steps in float32 (but for DDIM), which bounds the agreement; torchdiffeq steps in float64.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from oracles import mixture, noise, nonlinear_field, relative_error
from torch import Tensor
from torchdiffeq import odeint

from solvers.families.base import ButcherTableau, Family, GridSolver, RungeKutta
from solvers.families.ddim import DDIM
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.grids import UNIFORM, Grid
from solvers.prediction import PredictionField
from solvers.schedulers import VP, CondOT

TRAIN_STEPS = 1000

# diffusers hands a tensor to NumPy 2 in the old way; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def _time_of(timestep: int) -> float:
    """diffusers' timestep k, 0 the last before the data, as our t: k = 999 is t = 0 and the data itself is t = 1."""
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
    """'trailing' timesteps are our uniform grid on VP; the last step goes to alpha = 1, our t = 1. Both in float64."""
    reference = DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=_vp_betas(),
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    # diffusers multiplies betas up in float32; the product itself is what defines the path.
    reference.alphas_cumprod = _vp_alphas_cumprod()
    reference.set_timesteps(steps)
    network, x0 = mixture().network(prediction, VP()), noise(6, 2)
    expected = VP().sigma(0.0) * x0
    for k in reference.timesteps.tolist():
        output = network(expected, torch.tensor(_time_of(k), dtype=torch.float64))
        expected = reference.step(output, k, expected).prev_sample
    found = GridSolver(DDIM(), steps, UNIFORM).sample(PredictionField(network, prediction, VP()), x0)
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("steps", "final"), [(3, "zero"), (8, "zero"), (20, "zero"), (3, "sigma_min"), (8, "sigma_min")]
)
def test_dpmpp_2m_equals_diffusers_on_a_noise_prediction(steps: int, final: str) -> None:
    """DPM-Solver++(2M), midpoint form, to sigma = 0 or to the last trained time, with a first-order last step.

    Below 15 steps diffusers takes that last step wherever it ends ('lower_order_final'); we always do.
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
    found = DPMpp2M().integrate(field, VP().sigma(0.0) * x0, torch.tensor(times, dtype=torch.float64))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_dpmpp_2m_equals_diffusers_on_a_flow(steps: int) -> None:
    """On flow sigmas alpha = 1 - sigma, diffusers' network is -u, and t = 1 - sigma starts at 0.001."""
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


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers_flow_matching_sampler(shift: float) -> None:
    """FlowMatchEulerDiscreteScheduler steps -u in sigma = 1 - t; a shift only moves its grid."""
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
    """The same grid, float64. torchdiffeq's rk4 is the 3/8 rule, so it is compared with that tableau, not with ours."""
    field, x0 = nonlinear_field(CondOT()), noise(6, 3)
    times = Grid("warped", p=1.6, q=1.2).times(6, CondOT())
    expected = odeint(lambda t, x: field(x, t), x0, times, method=method)[-1]
    assert relative_error(family.integrate(field, x0, times), expected) < 1e-12


def test_classical_rk4_is_not_torchdiffeqs_rk4() -> None:
    """They differ on a coarse grid and agree in the limit: both are of fourth order."""
    field, x0 = nonlinear_field(CondOT()), noise(6, 3)
    differences = []
    for steps in (4, 64):
        times = UNIFORM.times(steps, CondOT())
        theirs = odeint(lambda t, x: field(x, t), x0, times, method="rk4")[-1]
        differences.append(relative_error(RK4().integrate(field, x0, times), theirs))
    assert differences[0] > 1e-5
    assert differences[1] < differences[0] / 16**3
