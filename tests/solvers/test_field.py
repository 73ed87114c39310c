"""Velocity-field wrappers: counting, guidance, and per-sample times."""

from __future__ import annotations

import pytest
import torch
from oracles import affordable_nfe, noise, nonlinear_field
from torch import Tensor

from solvers.families.base import Family, GridSolver
from solvers.field import CountingField, GuidedPrediction, per_sample
from solvers.grids import UNIFORM
from solvers.schedulers import VP, CondOT


def test_a_family_makes_exactly_nfe_evaluations(family: Family) -> None:
    """NFE counts velocity evaluations, and a counted field returns the same velocities as the field itself."""
    nfe = affordable_nfe(family, 4)
    field, x0 = nonlinear_field(CondOT()), noise(3, 2)
    counted = CountingField(field)
    sample = GridSolver(family, nfe, UNIFORM).sample(counted, x0)
    assert counted.nfe == nfe
    assert torch.equal(sample, GridSolver(family, nfe, UNIFORM).sample(field, x0))


def test_guidance_costs_two_forwards_per_evaluation() -> None:
    """With classifier-free guidance one evaluation is two forwards; both counts are reported."""
    counted = CountingField(nonlinear_field(CondOT()), forwards_per_evaluation=2)
    for _ in range(3):
        counted(noise(1, 2), torch.tensor(0.5))
    assert (counted.nfe, counted.forwards) == (3, 6)


class _Network:
    """A conditional network that records its batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x * condition[:, None] + t


def test_guidance_scale_one_runs_the_conditional_network_once() -> None:
    """s = 1 means unguided (diffusers' convention): one forward of the batch, without the null condition."""
    network, x, condition = _Network(), noise(4, 3), torch.arange(4.0, dtype=torch.float64)
    guided = GuidedPrediction(network, condition, torch.full((4,), -1.0, dtype=torch.float64), guidance_scale=1.0)
    output = guided(x, torch.tensor(0.25))
    assert (network.batches, guided.forwards_per_evaluation) == ([4], 1)
    torch.testing.assert_close(output, x * condition[:, None] + 0.25)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_output_in_one_doubled_batch(scale: float) -> None:
    """f_null + s (f_cond - f_null), from one forward of twice the batch."""
    network, x, condition = _Network(), noise(4, 3), torch.arange(4.0, dtype=torch.float64)
    null = torch.full((4,), -1.0, dtype=torch.float64)
    guided = GuidedPrediction(network, condition, null, guidance_scale=scale)
    output = guided(x, torch.tensor(0.25))
    assert (network.batches, guided.forwards_per_evaluation) == ([8], 2)
    conditional, unconditional = x * condition[:, None] + 0.25, x * null[:, None] + 0.25
    torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional))


def test_guidance_doubles_the_times_with_the_batch() -> None:
    """With one time per sample, both halves of the doubled batch are evaluated at the sample's own time."""

    def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * condition[:, None] + per_sample(t, x)

    x, t, condition = noise(4, 3), torch.linspace(0, 1, 4, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    guided = GuidedPrediction(network, condition, -condition, guidance_scale=3.0)
    alone = torch.stack([guided(x, time)[i] for i, time in enumerate(t)])
    torch.testing.assert_close(guided(x, t), alone, rtol=0, atol=0)


def test_per_sample_shapes_times_to_multiply_samples() -> None:
    """0-d stays 0-d; one value per sample multiplies all dimensions of that sample, in its dtype."""
    x = torch.ones(2, 3, 1)
    assert per_sample(torch.tensor(0.5, dtype=torch.float64), x).shape == ()
    product = per_sample(torch.tensor([1.0, 2.0], dtype=torch.float64), x) * x
    torch.testing.assert_close(product, torch.tensor([[[1.0]] * 3, [[2.0]] * 3]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_times_that_are_neither_scalar_nor_per_sample_are_rejected(shape: tuple[int, ...]) -> None:
    """A vector of another length would silently broadcast over the dimensions of a sample."""
    with pytest.raises(ValueError, match=r"times of shape .* for a batch of 2 samples; give one time \(0-d\), or one"):
        per_sample(torch.zeros(shape, dtype=torch.float64), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.5, 1.2, 0.1], r"velocity queried at t=1\.2, outside the domain \[0, 1\] of the vp scheduler"),
        ([0.5, -0.3, 0.1], r"velocity queried at t=-0\.3, outside the domain"),
        ([0.5, float("nan"), 0.1], r"velocity queried at t=nan, outside the domain"),
        ([0.5, 1.0, 0.1], r"the velocity of the vp scheduler is infinite at t=1"),
    ],
)
def test_one_bad_time_among_many_is_rejected(times: list[float], message: str) -> None:
    """The domain is checked for every sample, and the message names the offending time."""
    with pytest.raises(ValueError, match=message):
        VP().check_velocity_time(torch.tensor(times, dtype=torch.float64))
