"""Euler with a time shift: equivalence to diffusers' flow sampler, composition, and rejected shifts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracles import mixture, noise, relative_error

from solvers.families.base import GridSolver
from solvers.families.euler import Euler
from solvers.families.shifted_euler import ShiftedEuler
from solvers.grids import UNIFORM, Grid
from solvers.schedulers import CondOT


def _diffusers_sample(reference: FlowMatchEulerDiscreteScheduler, x0: torch.Tensor) -> torch.Tensor:
    """The sample of diffusers' flow sampler, which steps in float32."""
    field, x = mixture().field(CondOT()), x0
    for k, t in zip(reference.timesteps, 1 - reference.sigmas.double(), strict=False):
        x = reference.step(-field(x, t), k, x).prev_sample.double()
    return x


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sd3_variant_matches_diffusers_with_a_static_shift(shift: float, steps: int) -> None:
    """StableDiffusion3Pipeline: ``set_timesteps(n)`` on a scheduler with ``shift``, 3 in SD3."""
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    grid = Grid("sd3", shift=shift).times(steps, CondOT())
    torch.testing.assert_close(1 - grid, reference.sigmas.double(), rtol=0, atol=2e-7)
    x0, expected = noise(6, 2), _diffusers_sample(reference, noise(6, 2))
    family = ShiftedEuler(shift, pipeline="sd3")
    for solver in (GridSolver(family, steps, UNIFORM), GridSolver(Euler(), steps, Grid("sd3", shift=shift))):
        assert relative_error(solver.sample(mixture().field(CondOT()), x0), expected) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("mu", [0.0, 1.15])
def test_the_flux_variant_matches_diffusers_with_a_dynamic_shift(mu: float, steps: int) -> None:
    """FluxPipeline: sigmas from 1 to 1/n, shifted exponentially by mu, which is a shift of e^mu."""
    reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    grid = Grid("shifted", shift=math.exp(mu)).times(steps, CondOT())
    torch.testing.assert_close(1 - grid, reference.sigmas.double(), rtol=0, atol=2e-7)
    x0, expected = noise(6, 2), _diffusers_sample(reference, noise(6, 2))
    solver = GridSolver(ShiftedEuler(math.exp(mu)), steps, UNIFORM)
    assert relative_error(solver.sample(mixture().field(CondOT()), x0), expected) < 1e-5


def test_an_unknown_pipeline_is_rejected() -> None:
    with pytest.raises(ValueError, match="shifted_euler takes pipeline flux or sd3, got 'sd2'"):
        ShiftedEuler(3.0, pipeline="sd2")  # type: ignore[arg-type]


@pytest.mark.parametrize("domain", [CondOT(), CondOT(t_min=0.2, t_max=0.9)], ids=["whole", "cut"])
def test_shifted_euler_on_the_uniform_grid_equals_euler_on_the_shifted_grid(domain: CondOT) -> None:
    """The family and the grid implement the same formula."""
    family = GridSolver(ShiftedEuler(3.0), 7, UNIFORM).to_ns(domain)
    grid = GridSolver(Euler(), 7, Grid("shifted", shift=3.0)).to_ns(domain)
    torch.testing.assert_close(family.flat(), grid.flat(), rtol=0, atol=1e-14)


def test_shifts_compose() -> None:
    """A shift of 2 on a grid shifted by 3 equals a shift of 6."""
    composed = GridSolver(ShiftedEuler(2.0), 7, Grid("shifted", shift=3.0)).to_ns(CondOT())
    once = GridSolver(ShiftedEuler(6.0), 7, UNIFORM).to_ns(CondOT())
    torch.testing.assert_close(composed.flat(), once.flat(), rtol=0, atol=1e-14)


def test_the_ends_of_a_grid_are_not_shifted() -> None:
    """EDM's grid starts after t_min, from the noise level of that time; the shift moves only inner times."""
    theta = GridSolver(ShiftedEuler(3.0), 4, Grid("edm")).to_ns(CondOT())
    assert (float(theta.times[0]), float(theta.a[0])) == pytest.approx((1 / 81, 80 / 81), rel=1e-12)


def test_the_label_contains_the_shift() -> None:
    assert ShiftedEuler(1.5).label == "Euler shift=1.5"


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_a_shift_that_is_not_positive_is_rejected(shift: float) -> None:
    with pytest.raises(ValueError, match=f"shifted_euler's shift must be positive and finite, got {shift}"):
        ShiftedEuler(shift)
