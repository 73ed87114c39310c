"""Sampling with several solvers in one batch gives each solver its own samples and gradients."""

from __future__ import annotations

import pytest
import torch
from oracles import noise
from torch import Tensor

from solvers.batched import sample_batched
from solvers.field import FunctionField, per_sample
from solvers.ns import InvalidThetaError, NSSolver
from solvers.schedulers import CondOT

SOLVERS, BATCH, NFE = 3, 4, 5


def _velocity(x: Tensor, t: Tensor) -> Tensor:
    """A smooth nonlinear velocity that accepts one time or one time per sample."""
    t = per_sample(t, x)
    return torch.sin(2 * x + 3 * t) + 0.5 * torch.cos(x.roll(1, dims=-1) - t) - 0.3 * t * x


FIELD = FunctionField(_velocity, CondOT())


@pytest.fixture
def thetas() -> Tensor:
    """Three unrelated thetas, shape (3, 26)."""
    flats = 0.4 * noise(SOLVERS, NFE * (NFE + 5) // 2 + 1)
    flats[:, :NFE] = flats[:, :NFE].sigmoid()
    return flats


@pytest.fixture
def x0() -> Tensor:
    return noise(SOLVERS, BATCH, 2, 3, seed=1)


def test_each_solver_gives_the_same_samples_as_alone(thetas: Tensor, x0: Tensor) -> None:
    """Algorithm 1 does not depend on the other solvers in the batch."""
    batched = sample_batched(thetas, FIELD, x0)
    for theta, start, samples in zip(thetas, x0, batched, strict=True):
        torch.testing.assert_close(samples, NSSolver.from_flat(theta).sample(FIELD, start), rtol=1e-12, atol=1e-12)


def test_each_theta_gets_the_same_gradient_as_alone(thetas: Tensor, x0: Tensor) -> None:
    """One backward pass gives every theta its own gradient, through the states and through the times."""
    learned = thetas.clone().requires_grad_(True)
    (batched,) = torch.autograd.grad(sample_batched(learned, FIELD, x0).square().sum(), learned)
    for theta, start, gradient in zip(thetas, x0, batched, strict=True):
        alone = theta.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(NSSolver.from_flat(alone).sample(FIELD, start).square().sum(), alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_one_network_call_serves_all_solvers(thetas: Tensor, x0: Tensor) -> None:
    """n calls of k B samples in total, each sample evaluated at its own solver's time."""
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return _velocity(x, t)

    sample_batched(thetas, FunctionField(network, CondOT()), x0)
    torch.testing.assert_close(torch.stack(times), thetas[:, :NFE].T.repeat_interleave(BATCH, dim=1), rtol=0, atol=0)


def test_memory_kept_for_gradients_is_linear_in_nfe(thetas: Tensor) -> None:
    """x0 and the velocities are saved by reference and not copied per row: n + 1 states instead of n^2 / 2."""
    kept: dict[int, int] = {}
    x0 = noise(SOLVERS, 64, 4)  # each state is larger than any other tensor

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # This network saves nothing for its own backward pass.
    linear = FunctionField(lambda x, t: 0.5 * x, CondOT())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        samples = sample_batched(thetas.clone().requires_grad_(True), linear, x0)
    states = sum(size >= samples.untyped_storage().nbytes() for size in kept.values())
    assert 1 <= states <= NFE + 1


def test_thetas_and_batches_must_have_the_same_length(thetas: Tensor, x0: Tensor) -> None:
    with pytest.raises(ValueError, match=r"thetas of shape \(2, 26\) for 3 batches of samples; give one row per batch"):
        sample_batched(thetas[:2], FIELD, x0)


def test_a_row_of_invalid_length_is_rejected(thetas: Tensor, x0: Tensor) -> None:
    with pytest.raises(InvalidThetaError, match="a theta cannot have 25 numbers"):
        sample_batched(thetas[:, :-1], FIELD, x0)
