"""The papers' theorems, checked for every plugin.

Theorem 3.2 (BNS): every linear solver, on every path, for every kind of network, is a non-stationary solver.

Theorem 2.3 (BNS): every path couples the same noise with the same data.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from oracles import affordable_nfe, all_schedulers, mixture, noise, nonlinear_field, relative_error
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
"""A few thousand units in the last place, because a nonlinear field amplifies rounding from step to step."""

NETWORK_GRID = Grid("warped", p=1.4, q=1.2)


def _without_ends(scheduler: Scheduler) -> Scheduler:
    """``scheduler`` without its ends, where a noise prediction carries no information on the data or vice versa."""
    span = scheduler.t_max - scheduler.t_min
    return dataclasses.replace(scheduler, t_min=scheduler.t_min + 0.04 * span, t_max=scheduler.t_max - 0.04 * span)


def _is_variance_preserving(scheduler: Scheduler) -> bool:
    point = scheduler(0.5)
    return abs(float(point.alpha**2 + point.sigma**2) - 1) < 1e-9


@functools.cache
def _network(prediction: str, scheduler: Scheduler) -> PredictionField:
    return PredictionField(mixture().network(prediction, scheduler), prediction, scheduler)


def _deviation(solver: GridSolver, field: VelocityField, theta: NSSolver, x0: Tensor) -> float:
    """Relative error between a solver and its NS form, in units of the largest coefficient."""
    scale = max(1.0, float(theta.a.abs().max()), float(theta.b.abs().max()))
    return relative_error(theta.sample(field, x0), solver.sample(field, x0)) / scale


def test_every_family_on_every_path_of_every_network_is_a_non_stationary_solver(
    family: Family, scheduler: Scheduler
) -> None:
    """Theorem 3.2 for noise, data, v and velocity networks: sampling equals Algorithm 1 with (T, a, b)."""
    path = _without_ends(scheduler)
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
    Grid("sd3"),
    Grid("ays"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("scheduler", [CondOT(), EDM()], ids=lambda scheduler: scheduler.name)
def test_every_family_runs_on_every_grid(family: Family, scheduler: Scheduler, grid: Grid) -> None:
    """Theorem 3.2 holds for any grid: theta also represents a start later than t_min."""
    solver, field, x0 = GridSolver(family, affordable_nfe(family, 7), grid), nonlinear_field(scheduler), noise(3, 2)
    assert _deviation(solver, field, solver.to_ns(scheduler), x0) < ROUNDING


def test_every_family_runs_on_listed_times(family: Family) -> None:
    """The only kind of grid with a single number of steps."""
    nfe = affordable_nfe(family, 6)
    steps = family.steps(nfe)
    grid = Grid("given", listed=tuple(((k + 0.3) / steps) ** 0.9 for k in range(1, steps)) or (0.0,))
    solver, field, x0 = GridSolver(family, nfe, grid), nonlinear_field(CondOT()), noise(3, 2)
    assert _deviation(solver, field, solver.to_ns(CondOT()), x0) < ROUNDING


def test_every_kind_of_grid_is_covered() -> None:
    assert {*(grid.kind for grid in GRIDS), "given"} == set(KINDS)


# --- Theorem 2.3 --------------------------------------------------------------------------------------------------

COUPLED = CondOT(t_min=1e-4, t_max=1 - 1e-4)
"""The reference path, which has every noise level that any other path has."""

STEPS = 120


def _integrate(scheduler: Scheduler, x: Tensor, first: float, last: float) -> Tensor:
    """Integrate the mixture's exact velocity on ``scheduler`` by RK4, with equal steps in log-SNR."""
    lambdas = [float(scheduler.lambda_(t)) for t in (first, last)]
    times = scheduler.time_at_lambda(torch.linspace(*lambdas, STEPS + 1, dtype=torch.float64))
    times[0], times[-1] = first, last
    return RK4().integrate(mixture().field(scheduler), x, times)


@functools.cache
def _coupled_start() -> tuple[Tensor, Tensor]:
    """x0, and the state on ``COUPLED`` at its first time."""
    x0 = noise(8, 2)
    return x0, COUPLED.sigma(COUPLED.t_min) * x0


def _last(scheduler: Scheduler) -> float:
    """A time just before the end, at which the velocity is finite even on paths that end vertically."""
    return min(scheduler.t_max, 1 - 1e-5) if scheduler.velocity_is_singular_at_end else scheduler.t_max - 1e-5


def _first(scheduler: Scheduler) -> float:
    return scheduler.t_min if float(scheduler(scheduler.t_min).alpha) > 0 else scheduler.t_min + 1e-3


@pytest.mark.parametrize("scheduler", all_schedulers(), ids=lambda scheduler: scheduler.name)
def test_every_path_couples_the_same_noise_and_data(scheduler: Scheduler) -> None:
    """Theorem 2.3: states matched at equal SNR lead to states matched at equal SNR on every path, to 1e-4.

    x-bar = s x with s = hypot(alpha-bar, sigma-bar) / hypot(alpha, sigma), at both ends of the tested path.
    """
    change = SchedulerChange(COUPLED, scheduler)
    first, last = (min(max(end(scheduler), change.target.t_min), change.target.t_max) for end in (_first, _last))
    (t_first, s_first), (t_last, s_last) = (change.time_and_scale(r) for r in (first, last))
    before = _integrate(COUPLED, _coupled_start()[1], COUPLED.t_min, float(t_first))
    after = _integrate(COUPLED, before, float(t_first), float(t_last))
    transformed = _integrate(scheduler, s_first * before, first, last)
    assert relative_error(transformed / s_last, after) < 1e-4
    assert relative_error(after, _coupled_start()[0]) > 0.1  # the trajectory is not trivial


@pytest.mark.parametrize(
    ("scheduler", "least", "most"),
    [(VP(), 1e-4, 0.02), (EDM(), 1e-3, 0.05)],
    ids=lambda value: value.name if isinstance(value, Scheduler) else "",
)
def test_a_path_that_starts_with_a_trace_of_data_couples_slightly_differently(
    scheduler: Scheduler, least: float, most: float
) -> None:
    """Sampling starts from sigma(t_min) x0 instead of the matched state, which contains alpha E[x1 | x0].

    The samples differ from CondOT's by about 1e-3 for VP, whose snr(t_min) is 0.0066, and by 2e-3 for EDM, whose
    snr(t_min) is 1/80.
    """
    last = _last(scheduler)
    x0, _ = _coupled_start()
    unmatched = _integrate(scheduler, scheduler.sigma(scheduler.t_min) * x0, scheduler.t_min, last)
    t_last, s_last = SchedulerChange(COUPLED, scheduler).time_and_scale(last)
    coupled = _integrate(COUPLED, _coupled_start()[1], COUPLED.t_min, float(t_last))
    assert least < relative_error(unmatched / s_last, coupled) < most
