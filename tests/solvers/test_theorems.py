"""The papers' theorems, run over every plugin there is.

Theorem 3.2 (BNS): every linear solver, on every path, for every kind of network, is a non-stationary solver.
Theorem 2.3 (BNS): every path couples the same noise with the same data.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from oracles import affordable_nfe, mixture, noise, nonlinear_field, relative_error, schedulers_found
from torch import Tensor

from solvers.families.base import Family, GridSolver
from solvers.families.rk4 import RK4
from solvers.field import VelocityField
from solvers.grids import KINDS, Grid
from solvers.ns import NSSolver
from solvers.prediction import PREDICTIONS, PredictionField
from solvers.scale_time import SchedulerChange
from solvers.schedulers import EDM, VP, CondOT, Scheduler

# --- Theorem 3.2 --------------------------------------------------------------------------------------------------

ROUNDING = 1e-12
"""A few thousand last bits: a nonlinear field multiplies them from step to step."""

NETWORK_GRID = Grid("warped", p=1.4, q=1.2)


def _within_reach(scheduler: Scheduler) -> Scheduler:
    """``scheduler`` without its ends, where a noise prediction says nothing of the data or the other way round."""
    span = scheduler.t_max - scheduler.t_min
    return dataclasses.replace(scheduler, t_min=scheduler.t_min + 0.04 * span, t_max=scheduler.t_max - 0.04 * span)


def _is_variance_preserving(scheduler: Scheduler) -> bool:
    point = scheduler(0.5)
    return abs(float(point.alpha**2 + point.sigma**2) - 1) < 1e-9


@functools.cache
def _network(prediction: str, scheduler: Scheduler) -> PredictionField:
    return PredictionField(mixture().network(prediction, scheduler), prediction, scheduler)


def _deviation(solver: GridSolver, field: VelocityField, theta: NSSolver, x0: Tensor) -> float:
    """Between a solver and its form, in units of the numbers that were added up."""
    scale = max(1.0, float(theta.a.abs().max()), float(theta.b.abs().max()))
    return relative_error(theta.sample(field, x0), solver.sample(field, x0)) / scale


def test_every_family_on_every_path_of_every_network_is_a_non_stationary_solver(
    family: Family, scheduler: Scheduler
) -> None:
    """Theorem 3.2 with networks for noise, data, v and velocity: sampling equals Algorithm 1 at (T, a, b)."""
    path = _within_reach(scheduler)
    solver, x0 = GridSolver(family, affordable_nfe(family, 6), NETWORK_GRID), noise(3, 2)
    theta = solver.to_ns(path)
    for prediction in PREDICTIONS:
        if prediction == "v_prediction" and not _is_variance_preserving(scheduler):
            continue  # v-prediction is defined on variance-preserving paths
        assert _deviation(solver, _network(prediction, path), theta, x0) < ROUNDING, prediction


GRIDS = [
    Grid(),
    Grid("warped", p=1.6, q=1.2),
    Grid("log_snr"),
    Grid("polynomial", rho=5.0),
    Grid("edm"),
    Grid("shifted"),
    Grid("ays"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("scheduler", [CondOT(), EDM()], ids=lambda scheduler: scheduler.name)
def test_every_family_runs_on_every_grid(family: Family, scheduler: Scheduler, grid: Grid) -> None:
    """Theorem 3.2 does not ask for a kind of grid: theta carries a start that is later than t_min, too."""
    solver, field, x0 = GridSolver(family, affordable_nfe(family, 7), grid), nonlinear_field(scheduler), noise(3, 2)
    assert _deviation(solver, field, solver.to_ns(scheduler), x0) < ROUNDING


def test_every_family_runs_on_listed_times(family: Family) -> None:
    """The one kind of grid that makes a single number of steps."""
    nfe = affordable_nfe(family, 6)
    steps = family.steps(nfe)
    grid = Grid("given", listed=tuple(((k + 0.3) / steps) ** 0.9 for k in range(1, steps)) or (0.0,))
    solver, field, x0 = GridSolver(family, nfe, grid), nonlinear_field(CondOT()), noise(3, 2)
    assert _deviation(solver, field, solver.to_ns(CondOT()), x0) < ROUNDING


def test_no_kind_of_grid_is_left_out() -> None:
    assert {*(grid.kind for grid in GRIDS), "given"} == set(KINDS)


# --- Theorem 2.3 --------------------------------------------------------------------------------------------------

COUPLED = CondOT(t_min=1e-4, t_max=1 - 1e-4)
"""The path that the others are held against: it has every noise level that any of them has."""

STEPS = 120


def _integrate(scheduler: Scheduler, x: Tensor, first: float, last: float) -> Tensor:
    """The mixture's exact velocity on ``scheduler``'s own path, by RK4 with steps of equal size in log-SNR."""
    lambdas = [float(scheduler.lambda_(t)) for t in (first, last)]
    times = scheduler.time_at_lambda(torch.linspace(*lambdas, STEPS + 1, dtype=torch.float64))
    times[0], times[-1] = first, last
    return RK4().integrate(mixture().field(scheduler), x, times)


@functools.cache
def _stages() -> tuple[Tensor, Tensor]:
    """x0, and the state on ``COUPLED`` at its first time."""
    x0 = noise(8, 2)
    return x0, COUPLED.sigma(COUPLED.t_min) * x0


def _last(scheduler: Scheduler) -> float:
    """The last time at which the velocity can be asked, for paths that end vertically."""
    return min(scheduler.t_max, 1 - 1e-5) if scheduler.velocity_is_singular_at_end else scheduler.t_max - 1e-5


def _first(scheduler: Scheduler) -> float:
    return scheduler.t_min if float(scheduler(scheduler.t_min).alpha) > 0 else scheduler.t_min + 1e-3


@pytest.mark.parametrize("scheduler", schedulers_found(), ids=lambda scheduler: scheduler.name)
def test_every_path_couples_the_same_noise_and_data(scheduler: Scheduler) -> None:
    """Theorem 2.3: from states matched at equal SNR, every path leads to states matched at equal SNR, to 1e-4.

    x-bar = s x with s = hypot(alpha-bar, sigma-bar) / hypot(alpha, sigma), at both ends of the path under test.
    """
    change = SchedulerChange(COUPLED, scheduler)
    first, last = (min(max(end(scheduler), change.target.t_min), change.target.t_max) for end in (_first, _last))
    (t_first, s_first), (t_last, s_last) = (change.time_and_scale(r) for r in (first, last))
    before = _integrate(COUPLED, _stages()[1], COUPLED.t_min, float(t_first))
    after = _integrate(COUPLED, before, float(t_first), float(t_last))
    found = _integrate(scheduler, s_first * before, first, last)
    assert relative_error(found / s_last, after) < 1e-4
    assert relative_error(after, _stages()[0]) > 0.1  # it went somewhere


@pytest.mark.parametrize(
    ("scheduler", "least", "most"),
    [(VP(), 1e-4, 0.02), (EDM(), 1e-3, 0.05)],
    ids=lambda value: value.name if isinstance(value, Scheduler) else "",
)
def test_a_path_that_starts_with_a_trace_of_data_couples_a_little_differently(
    scheduler: Scheduler, least: float, most: float
) -> None:
    """Sampling starts from sigma(t_min) x0 and not from the matched state, which has alpha E[x1 | x0] in it.

    The samples differ from CondOT's by about 1e-3 for VP, whose snr(t_min) is 0.0066, and 2e-3 for EDM, with 1/80.
    """
    last = _last(scheduler)
    x0, _ = _stages()
    unmatched = _integrate(scheduler, scheduler.sigma(scheduler.t_min) * x0, scheduler.t_min, last)
    t_last, s_last = SchedulerChange(COUPLED, scheduler).time_and_scale(last)
    coupled = _integrate(COUPLED, _stages()[1], COUPLED.t_min, float(t_last))
    assert least < relative_error(unmatched / s_last, coupled) < most
