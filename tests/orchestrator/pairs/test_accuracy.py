"""The error of ground truth, from solutions at a tenth of its tolerance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from orchestrator.pairs.accuracy import PATIENCE, Accuracy, accuracy
from orchestrator.pairs.ground_truth import solve
from solvers.field import CountingField, FunctionField
from solvers.schedulers.cond_ot import CondOT

FREQUENCY = 9.0
ROTATION = FunctionField(lambda x, t: FREQUENCY * torch.stack([-x[:, 1], x[:, 0]], dim=1), CondOT())
X0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def _exact(x: Tensor) -> Tensor:
    cosine, sine, x = math.cos(FREQUENCY), math.sin(FREQUENCY), x.double()
    return torch.stack([x[:, 0] * cosine - x[:, 1] * sine, x[:, 0] * sine + x[:, 1] * cosine], dim=1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_error_is_that_from_the_exact_solution(tolerance: float) -> None:
    """For a rotation, whose exact solution is known, to a fifth of the error: the tighter solution has an error too."""
    truth = solve(ROTATION, X0, tolerance, tolerance)
    measured = accuracy(ROTATION, X0, truth.x1, tolerance, tolerance, limit=PATIENCE * truth.nfe)
    expected = (truth.x1 - _exact(X0)).square().mean(dim=1).sqrt()
    assert measured.rms == pytest.approx(expected.tolist(), rel=0.2)
    psnr = (20 * math.log10(2) - 20 * torch.log10(expected)).mean()
    assert measured.psnr_db(2.0, 300.0) == pytest.approx(float(psnr), abs=1.7)


def test_the_evaluations_spent_are_counted_per_sample() -> None:
    counted = CountingField(ROTATION)
    truth = solve(ROTATION, X0, 1e-5, 1e-5)
    measured = accuracy(counted, X0, truth.x1, 1e-5, 1e-5, limit=PATIENCE * truth.nfe)
    assert measured.evaluations == counted.nfe * len(X0) > truth.nfe * len(X0)


def test_a_tolerance_below_the_rounding_of_the_network_ends_at_the_limit() -> None:
    """A velocity with noise of 1e-3 cannot be solved to 1e-9: nothing is claimed, and no more is spent than allowed."""

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        return -x + 1e-3 * torch.sin(1e6 * x)

    counted = CountingField(FunctionField(noisy, CondOT()))
    measured = accuracy(counted, X0, X0, 1e-8, 1e-8, limit=300)
    assert (measured.rms, measured.psnr_db(2.0, 300.0), counted.nfe) == ((), None, 300)
    assert measured.problem is not None
    assert "rounding in the network is larger than the tolerance" in measured.problem
    assert measured.evaluations == 600


def test_a_velocity_that_is_finite_only_on_coarse_steps_is_a_problem_with_its_reason() -> None:
    """The tighter solution may meet what the first has stepped over."""

    def pole(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, math.nan)

    measured = accuracy(FunctionField(pole, CondOT()), X0, X0, 1e-3, 1e-3, limit=300)
    assert measured.problem is not None
    assert measured.problem.startswith("at a tenth of the tolerance, the network's first evaluation")


def test_samples_that_do_not_move_have_a_finite_accuracy() -> None:
    """JSON has no infinity: an exact ground truth, as of a network that returns 0, counts with a limit."""
    assert Accuracy((0.0, 0.0), 10).psnr_db(2.0, 300.0) == 300.0
    assert Accuracy((0.0, 2.0), 10).psnr_db(2.0, 300.0) == 150.0
