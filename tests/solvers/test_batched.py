"""Several solvers in one batch: each one's samples and gradients are its own."""

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
    """Smooth and nonlinear; answers one time or one a sample."""
    t = per_sample(t, x)
    return torch.sin(2 * x + 3 * t) + 0.5 * torch.cos(x.roll(1, dims=-1) - t) - 0.3 * t * x


FIELD = FunctionField(_velocity, CondOT())


@pytest.fixture
def thetas() -> Tensor:
    """Three theta that have nothing in common, shape (3, 26)."""
    numbers = 0.4 * noise(SOLVERS, NFE * (NFE + 5) // 2 + 1)
    numbers[:, :NFE] = numbers[:, :NFE].sigmoid()
    return numbers


@pytest.fixture
def x0() -> Tensor:
    return noise(SOLVERS, BATCH, 2, 3, seed=1)


def test_each_solver_samples_as_it_does_alone(thetas: Tensor, x0: Tensor) -> None:
    """Algorithm 1 knows nothing of the other solvers in the batch."""
    together = sample_batched(thetas, FIELD, x0)
    for theta, start, samples in zip(thetas, x0, together, strict=True):
        torch.testing.assert_close(samples, NSSolver.from_flat(theta).sample(FIELD, start), rtol=1e-12, atol=1e-12)


def test_each_gradient_is_that_of_the_solver_alone(thetas: Tensor, x0: Tensor) -> None:
    """One backward pass gives every theta its own gradient, through states and through times."""
    learned = thetas.clone().requires_grad_(True)
    (together,) = torch.autograd.grad(sample_batched(learned, FIELD, x0).square().sum(), learned)
    for theta, start, found in zip(thetas, x0, together, strict=True):
        alone = theta.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(NSSolver.from_flat(alone).sample(FIELD, start).square().sum(), alone)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_call_of_the_network_serves_all_solvers(thetas: Tensor, x0: Tensor) -> None:
    """n calls of k B samples, each asked at the time of its own solver: the whole purpose."""
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return _velocity(x, t)

    sample_batched(thetas, FunctionField(network, CondOT()), x0)
    torch.testing.assert_close(torch.stack(asked), thetas[:, :NFE].T.repeat_interleave(BATCH, dim=1), rtol=0, atol=0)


def test_what_is_kept_for_gradients_grows_as_the_states(thetas: Tensor) -> None:
    """References to x0 and the velocities, and no copy of them for every row: n + 1 states, not n^2 / 2."""
    kept: dict[int, int] = {}
    x0 = noise(SOLVERS, 64, 4)  # states larger than anything else

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # A network that keeps nothing itself.
    linear = FunctionField(lambda x, t: 0.5 * x, CondOT())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        samples = sample_batched(thetas.clone().requires_grad_(True), linear, x0)
    states = sum(size >= samples.untyped_storage().nbytes() for size in kept.values())
    assert 1 <= states <= NFE + 1


def test_thetas_and_batches_must_be_as_many(thetas: Tensor, x0: Tensor) -> None:
    with pytest.raises(ValueError, match=r"thetas of shape \(2, 26\) for 3 batches of samples; give one row for each"):
        sample_batched(thetas[:2], FIELD, x0)


def test_a_row_that_is_no_theta_is_refused(thetas: Tensor, x0: Tensor) -> None:
    with pytest.raises(InvalidThetaError, match="25 numbers are no theta"):
        sample_batched(thetas[:, :-1], FIELD, x0)
