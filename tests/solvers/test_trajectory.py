"""Ground-truth paths between the adaptive solver's knots: exactness, order, padding, and rejected input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import noise
from torch import Tensor

from solvers.trajectory import DensePath

#: Two samples with different knots.
KNOTS = torch.tensor([[0.0, 0.2, 0.5, 0.55, 1.0], [0.0, 0.1, 0.3, 0.9, 1.0]], dtype=torch.float64)

#: Unordered times: the ends, a knot of each sample, and times between knots.
TIMES = torch.tensor([0.7, 0.0, 0.2, 0.31, 1.0, 0.52, 0.9, 0.01], dtype=torch.float64)


def polynomial(coefficients: Tensor, t: Tensor) -> Tensor:
    """sum_d c_d t^d for coefficients (D, B, ...) and times (B, m): (B, m, ...)."""
    t = t.reshape(*t.shape, *(1,) * (coefficients.ndim - 2))
    return sum((c[:, None] * t**d for d, c in enumerate(coefficients)), torch.zeros(()))


def polynomial_path(coefficients: Tensor, times: Tensor = KNOTS) -> DensePath:
    slopes = torch.stack([d * c for d, c in enumerate(coefficients)][1:])
    return DensePath(times, polynomial(coefficients, times), polynomial(slopes, times))


def expected_at(coefficients: Tensor, times: Tensor) -> Tensor:
    return polynomial(coefficients, times.expand(coefficients.shape[1], -1)).transpose(0, 1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)], ids=["scalars", "vectors", "images"])
def test_cubic_polynomials_are_exact(shape: tuple[int, ...]) -> None:
    """Four conditions per interval determine a cubic, for any sample shape and any knots."""
    coefficients = noise(4, 2, *shape)
    states = polynomial_path(coefficients).state(TIMES)
    assert states.shape == (len(TIMES), 2, *shape)
    torch.testing.assert_close(states, expected_at(coefficients, TIMES), rtol=1e-13, atol=1e-14)


def test_quartic_polynomials_are_not_exact() -> None:
    """Four conditions cannot determine a quartic, which shows that the test above can fail."""
    coefficients = noise(5, 2, 3)
    states = polynomial_path(coefficients).state(TIMES)
    assert float((states - expected_at(coefficients, TIMES)).abs().max()) > 1e-4


def test_the_error_is_of_fourth_order_in_the_knot_distance() -> None:
    """Halving the distance divides the error by 16, so dopri5's own steps suffice as knots."""
    between = torch.linspace(0, 1, 301, dtype=torch.float64)
    errors = []
    for knots in (17, 33, 65):
        times = torch.linspace(0, 1, knots, dtype=torch.float64).expand(1, -1)
        path = DensePath(times, torch.sin(5 * times), 5 * torch.cos(5 * times))
        errors.append(float((path.state(between)[:, 0] - torch.sin(5 * between)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.15)


def test_knots_are_returned_bit_for_bit() -> None:
    """At a knot the path is the ground truth itself; this matters most at the end."""
    path = DensePath(KNOTS, noise(2, 5, 3), noise(2, 5, 3, seed=1))
    for sample in range(2):
        assert torch.equal(path.state(KNOTS[sample])[:, sample], path.states[sample])


def test_a_scalar_time_gives_the_result_without_a_time_axis() -> None:
    path = polynomial_path(noise(4, 2, 3))
    assert torch.equal(path.state(0.31), path.state(torch.tensor([0.31], dtype=torch.float64))[0])


def test_padding_does_not_change_a_path() -> None:
    """A sample with fewer steps repeats its last knot, without any effect on its states."""
    path = DensePath(KNOTS, noise(2, 5, 3), noise(2, 5, 3, seed=1))
    padded = DensePath(
        *(torch.cat([values, values[:, -1:].expand(-1, 3, *values.shape[2:])], dim=1) for values in vars(path).values())
    )
    assert torch.equal(padded.state(TIMES), path.state(TIMES))


def test_each_sample_has_its_own_knots() -> None:
    """Row i of a batch equals the path of sample i alone."""
    path = polynomial_path(noise(5, 2, 3))
    alone = DensePath(path.times[1:], path.states[1:], path.velocities[1:])
    assert torch.equal(path.state(TIMES)[:, 1:], alone.state(TIMES))


def test_the_derivative_in_time_of_a_cubic_is_its_slope() -> None:
    """``state`` is differentiable in t, so objectives that learn times can use it directly."""
    coefficients = noise(4, 1, 1)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(polynomial_path(coefficients, KNOTS[:1]).state(t).sum(), t)
    c = coefficients[:, 0, 0]
    assert float(slope) == pytest.approx(float(c[1] + 2 * c[2] * 0.4 + 3 * c[3] * 0.16), rel=1e-12)


def test_states_keep_their_precision() -> None:
    """float32 states at float64 times give float32 results, accurate to the last digits."""
    coefficients = noise(4, 2, 3)
    exact = polynomial_path(coefficients)
    single = DensePath(exact.times, exact.states.float(), exact.velocities.float()).state(TIMES)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact.state(TIMES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [-1e-3, 1.001, float("nan")])
def test_a_time_outside_the_trajectory_is_rejected(t: float) -> None:
    with pytest.raises(ValueError, match=rf"queried at t={t:.6g}, outside the path's times \[0, 1\]; make the traj"):
        polynomial_path(noise(4, 2, 3)).state(torch.tensor([0.5, t], dtype=torch.float64))


def test_the_domain_is_covered_by_every_sample() -> None:
    """A shorter sample must not be extrapolated because other samples of the batch go further."""
    times = KNOTS.clone()
    times[1, -1] = 0.95
    path = dataclasses.replace(polynomial_path(noise(4, 2, 3)), times=times)
    with pytest.raises(ValueError, match=r"outside the path's times \[0, 0\.95\]"):
        path.state(0.97)


def test_rounding_at_the_ends_is_tolerated() -> None:
    """A learned time may exceed the end by the rounding of a sum."""
    path = polynomial_path(noise(4, 2, 3))
    assert torch.equal(path.state(1 + 1e-12), path.state(1.0))


def test_times_with_two_axes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"one time or a vector of times, got shape \(2, 2\)"):
        polynomial_path(noise(4, 2, 3)).state(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"times": KNOTS.float()},
            r"times are \(B, K\) in float64 with at least 2 knots, got \(2, 5\) in torch.float32",
        ),
        ({"times": KNOTS[0]}, r"times are \(B, K\) in float64 with at least 2 knots, got \(5,\)"),
        ({"times": KNOTS[:, :1]}, r"at least 2 knots, got \(2, 1\)"),
        ({"times": KNOTS[:, :4]}, r"a path of times \(2, 4\) has states and velocities of one shape"),
        ({"velocities": noise(2, 5, 4)}, r"got \(2, 5, 3\) in torch.float64 and \(2, 5, 4\) in torch.float64"),
        ({"velocities": noise(2, 5, 3).float()}, r"and dtype, got .* in torch.float64 and .* in torch.float32"),
        ({"times": KNOTS.flip(1)}, "times must be finite and must not fall from knot to knot"),
        ({"times": KNOTS * float("nan")}, "times must be finite and must not fall from knot to knot"),
    ],
    ids=["float32", "one-axis", "one-knot", "knots", "shape", "dtype", "falling", "nan"],
)
def test_an_invalid_path_is_rejected(change: dict[str, Tensor], message: str) -> None:
    """An invalid path fails at construction and not later in a loss."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(polynomial_path(noise(4, 2, 3)), **change)
