"""Wrappers of velocity fields: counting and guidance."""

from __future__ import annotations

import pytest
import torch
from oracles import affordable_nfe, noise, nonlinear_field
from torch import Tensor

from solvers.families.base import Family, GridSolver
from solvers.field import CountingField, GuidedPrediction
from solvers.grids import UNIFORM
from solvers.schedulers import CondOT


def test_a_family_makes_exactly_the_evaluations_it_is_given(family: Family) -> None:
    """NFE counts velocity evaluations, and the answer of a counted field is the field's own."""
    nfe = affordable_nfe(family, 4)
    field, x0 = nonlinear_field(CondOT()), noise(3, 2)
    counted = CountingField(field)
    sample = GridSolver(family, nfe, UNIFORM).sample(counted, x0)
    assert counted.nfe == nfe
    assert torch.equal(sample, GridSolver(family, nfe, UNIFORM).sample(field, x0))


def test_guidance_costs_two_forwards_per_evaluation() -> None:
    """MATH: with classifier-free guidance one evaluation is two forwards; both are reported."""
    counted = CountingField(nonlinear_field(CondOT()), forwards_per_evaluation=2)
    for _ in range(3):
        counted(noise(1, 2), torch.tensor(0.5))
    assert (counted.nfe, counted.forwards) == (3, 6)


class _Network:
    """A conditional network that remembers the sizes of the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x * condition[:, None] + t


def test_guidance_scale_one_is_the_conditional_network_in_one_forward() -> None:
    """s = 1 is unguided (diffusers' convention): one forward of the batch, no null condition."""
    network, x, condition = _Network(), noise(4, 3), torch.arange(4.0, dtype=torch.float64)
    guided = GuidedPrediction(network, condition, torch.full((4,), -1.0, dtype=torch.float64), guidance_scale=1.0)
    found = guided(x, torch.tensor(0.25))
    assert (network.batches, guided.forwards_per_evaluation) == ([4], 1)
    torch.testing.assert_close(found, x * condition[:, None] + 0.25)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_output_in_one_doubled_batch(scale: float) -> None:
    """f_null + s (f_cond - f_null), from one forward of twice the batch."""
    network, x, condition = _Network(), noise(4, 3), torch.arange(4.0, dtype=torch.float64)
    null = torch.full((4,), -1.0, dtype=torch.float64)
    guided = GuidedPrediction(network, condition, null, guidance_scale=scale)
    found = guided(x, torch.tensor(0.25))
    assert (network.batches, guided.forwards_per_evaluation) == ([8], 2)
    conditional, unconditional = x * condition[:, None] + 0.25, x * null[:, None] + 0.25
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional))
