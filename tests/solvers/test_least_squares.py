"""The greedy least-squares start: exact recovery, accuracy on fresh noise, cost, and rejected input."""

from __future__ import annotations

import functools

import pytest
import torch
from oracles import fine_rk4, mixture, noise, relative_error
from torch import Tensor

from solvers.distil.least_squares import fit
from solvers.distil.pair_field import unconditional
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.field import CountingField, FunctionField
from solvers.grids import UNIFORM
from solvers.schedulers import VP, CondOT, Scheduler

FIELD = mixture().field(CondOT())
PAIRS = 96


def trajectories(field: FunctionField, x0: Tensor, times: Tensor) -> Tensor:
    """The exact state at each time, from a fine integrator."""
    states = [field.scheduler.sigma(times[0]) * x0]
    for first, last in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        states.append(fine_rk4(field, states[-1], first, last, steps=20))
    return torch.stack(states)


@functools.cache
def problem(nfe: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, states, times) of the mixture on a uniform grid."""
    x0, times = noise(PAIRS, 2), UNIFORM.times(nfe, CondOT())
    return x0, trajectories(FIELD, x0, times), times


def _error(sample: Tensor, exact: Tensor) -> float:
    return float((sample - exact).square().mean().sqrt())


@pytest.mark.parametrize("nfe", [1, 4, 8])
def test_a_solver_is_recovered_from_its_own_states(nfe: int) -> None:
    """If some solver on these times passes exactly through the states, the fit does as well."""
    x0, _, times = problem(nfe)
    solver = GridSolver(AdamsBashforth(2), nfe, UNIFORM).to_ns(CondOT())
    states = torch.stack(list(solver.states(FIELD, x0)))
    fitted = fit(unconditional(FIELD), x0, states, times)
    assert relative_error(fitted.sample(FIELD, x0), states[-1]) < 1e-6


@pytest.mark.parametrize("nfe", [4, 8])
def test_the_fit_halves_the_error_of_euler_and_ab2_on_fresh_noise(nfe: int) -> None:
    """It is fitted to trajectories on the same grid and scored on held-out noise."""
    solver = fit(unconditional(FIELD), *problem(nfe))
    fresh = noise(200, 2, seed=9)
    exact = fine_rk4(FIELD, fresh, 0.0, 1.0, steps=100)
    error = _error(solver.sample(FIELD, fresh), exact)
    for family in (Euler(), AdamsBashforth(2)):
        assert error < 0.5 * _error(GridSolver(family, nfe, UNIFORM).sample(FIELD, fresh), exact)


def test_each_row_is_the_least_squares_fit_of_its_state() -> None:
    """The residual of row k is orthogonal to x0 and to the velocities at the solver's own states."""
    x0, states, times = problem(4)
    solver = fit(unconditional(FIELD), x0, states, times, ridge=1e-15)
    own = list(solver.states(FIELD, x0))
    basis = [x0, *(FIELD(x, t) for x, t in zip(own, solver.times, strict=False))]
    for k in range(1, 5):
        residual = own[k] - states[k]
        products = torch.stack([(residual * column).sum() / column.norm() for column in basis[: k + 1]])
        assert float(products.abs().max()) < 1e-9 * float(states[k].norm())


def test_the_fit_makes_n_evaluations_per_pair() -> None:
    """One model call per row and batch of pairs."""
    counted = CountingField(FIELD)
    fit(unconditional(counted), *problem(8), batch_size=PAIRS // 2)
    assert counted.nfe == 8 * 2


def test_the_batch_size_changes_only_rounding() -> None:
    """Sums are taken in float64 over all pairs, for any batch size."""
    single_batch = fit(unconditional(FIELD), *problem(4))
    small_batches = fit(unconditional(FIELD), *problem(4), batch_size=7)
    assert relative_error(small_batches.sample(FIELD, noise(9, 2)), single_batch.sample(FIELD, noise(9, 2))) < 1e-7


def test_each_pair_is_evaluated_with_its_own_conditioning() -> None:
    """A field that moves each pair differently can be fitted only if rows and conditioning stay aligned."""
    scheduler, count = CondOT(), 20
    targets = noise(count, 2, seed=3)

    def field_of(rows: Tensor) -> FunctionField:
        return FunctionField(lambda x, t: targets[rows] - x, scheduler)

    x0, times = noise(count, 2), UNIFORM.times(6, scheduler)
    states = trajectories(field_of(torch.arange(count)), x0, times)
    solver = fit(field_of, x0, states, times, batch_size=6)
    assert relative_error(solver.sample(field_of(torch.arange(count)), x0), states[-1]) < 1e-6


@pytest.mark.parametrize("scheduler", [CondOT(), CondOT(t_min=0.2), VP(t_max=0.98)], ids=["cond_ot", "cut", "vp"])
def test_the_fit_begins_at_the_usual_time_and_state(scheduler: Scheduler) -> None:
    """a_0 = sigma(t_min) and t_0 = t_min, so BNS can start from it."""
    field, x0, times = mixture().field(scheduler), noise(40, 2), UNIFORM.times(5, scheduler)
    solver = fit(unconditional(field), x0, trajectories(field, x0, times), times)
    assert float(solver.times[0]) == scheduler.t_min
    assert float(solver.a[0]) == float(scheduler.sigma(scheduler.t_min))
    assert torch.equal(BNS().to_ns(BNS().start_from(solver, scheduler), scheduler, 1.0).flat(), solver.flat())


def test_the_ridge_handles_collinear_velocities() -> None:
    """On a straight flow all velocities are equal: the fit is not unique, but the result is finite and accurate."""
    target = noise(30, 2, seed=4)
    x0, times = noise(30, 2), UNIFORM.times(6, CondOT())
    straight = FunctionField(lambda x, t: target - x0, CondOT())
    states = torch.stack([(1 - t) * x0 + t * target for t in times])
    solver = fit(unconditional(straight), x0, states, times)
    assert float(solver.flat().abs().max()) < 10
    assert relative_error(solver.sample(straight, x0), target) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": torch.tensor([0.5], dtype=torch.float64)}, r"times must be t_0..t_n, shape \(n\+1,\)"),
        ({"states_at_grid": torch.zeros(4, PAIRS, 2)}, r"at each of the 5 times, shape \(5, 96, 2\), got \(4, 96, 2\)"),
        ({"x0": torch.zeros(0, 2), "states_at_grid": torch.zeros(5, 0, 2)}, "no pairs to fit"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ridge": 0.0}, r"ridge must be positive, got 0.0"),
        (
            {"times": torch.linspace(0.1, 1, 5, dtype=torch.float64)},
            r"the grid begins at t=0.1, but sampling under the cond_ot scheduler begins at t=0",
        ),
        (
            {"states_at_grid": torch.full((5, PAIRS, 2), torch.nan)},
            r"velocities at t=0 or the states at t=0.25 are not finite; check the model and the trajectories",
        ),
    ],
    ids=["times", "shape", "empty", "batch", "ridge", "begin", "nan"],
)
def test_input_that_cannot_be_fitted_is_rejected(change: dict[str, object], message: str) -> None:
    """Each message names the value and a remedy."""
    x0, states, times = problem(4)
    with pytest.raises(ValueError, match=message):
        fit(unconditional(FIELD), **({"x0": x0, "states_at_grid": states, "times": times} | change))  # type: ignore[arg-type]
