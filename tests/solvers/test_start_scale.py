"""``start_scale``: solvers and ground truth begin where the authors do, which may be x0 and not sigma(t_min) x0."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import (
    affordable_nfe,
    all_schedulers,
    fine_rk4,
    fixed_families,
    learnable_starts,
    mixture,
    noise,
    relative_error,
)

from orchestrator.pairs.ground_truth import solve
from solvers.distil.least_squares import fit
from solvers.families.base import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import UNIFORM, Grid
from solvers.prediction import PredictionField
from solvers.scale_time import SchedulerChange
from solvers.schedulers import VP, CondOT, DiscreteVP, Scheduler

POLICY = DiscreteVP(betas=tuple(0.001 + 0.0008 * k for k in range(20)), start_scale=1.0)
"""A path whose last timestep keeps most of the data, sampled from the noise itself, as some policies are."""


@pytest.fixture(params=[*all_schedulers(), POLICY], ids=lambda scheduler: scheduler.name)
def native(request: pytest.FixtureRequest) -> Scheduler:
    """Each scheduler, begun inside its domain from 1.7 times its noise."""
    given: Scheduler = request.param
    start = dataclasses.replace(given, t_min=0.2, start_scale=None)
    return dataclasses.replace(start, start_scale=1.7 * float(start.sigma(0.2)))


def test_the_first_state_is_the_scale_itself() -> None:
    """At alpha_bar = 0.85 the authors' x0 is three times the path's noise."""
    assert float(POLICY.sigma(0)) < 0.4
    assert float(POLICY.start(0)) == 1.0
    assert float(GridSolver(Midpoint(), 4, UNIFORM).to_ns(POLICY).a[0]) == 1.0


def test_without_a_scale_sampling_starts_from_the_noise_of_the_path() -> None:
    for scheduler in all_schedulers():
        assert torch.equal(scheduler.start(scheduler.t_min), scheduler.sigma(scheduler.t_min))


def test_another_scheduler_starts_from_the_same_state(native: Scheduler) -> None:
    """Presented under CondOT and mapped back, the first state is start_scale x0."""
    change = SchedulerChange(native, CondOT())
    _, scale = change.time_and_scale(change.target.t_min)
    begun = change.target.start(change.target.t_min) / scale
    assert native.start_scale is not None
    assert float(begun) == pytest.approx(native.start_scale, rel=1e-9)


def test_ground_truth_and_solvers_start_there(native: Scheduler) -> None:
    """With and without preconditioning, a solver of many steps ends where plain RK4 does, and ground truth as well."""
    network, x0 = mixture().network("sample", native), noise(4, 2)
    field = PredictionField(network, "sample", native, SchedulerChange(native, CondOT(t_max=0.98)).target)
    path = field.scheduler
    exact = fine_rk4(field, float(path.start(path.t_min)) * x0, path.t_min, path.t_max, 60)
    other = fine_rk4(field, float(path.sigma(path.t_min)) * x0, path.t_min, path.t_max, 60)
    assert relative_error(other, exact) > 0.05
    assert relative_error(solve(field, x0, 1e-4, 1e-4).x1, exact) < 2e-3
    for sigma0 in (1.0, 3.0):
        theta = GridSolver(Midpoint(), 60, Grid("log_snr"), sigma0).to_ns(path)
        assert relative_error(theta.sample(field, x0), exact) < 2e-2


def test_every_family_has_a_theta_that_starts_there(native: Scheduler) -> None:
    """a_0 is the scale, and the theta's samples are the solver's."""
    x0 = noise(3, 2)
    native = dataclasses.replace(native, t_max=min(native.t_max, 0.9))
    field = PredictionField(mixture().network("velocity", native), "velocity", native)
    for family in fixed_families():
        solver = GridSolver(family, affordable_nfe(family, 4), UNIFORM)
        theta = solver.to_ns(native)
        assert float(theta.a[0]) == pytest.approx(native.start_scale, rel=1e-9), family.label
        assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < 1e-9, family.label


def test_learned_families_keep_the_start() -> None:
    """Every learned family that holds its first state holds the scale."""
    native = VP(t_max=0.99, start_scale=1.3)
    for learned, fixed in {one.label: (one, fixed) for one, fixed in learnable_starts(allowed=True)}.values():
        start = learned.start(GridSolver(fixed, affordable_nfe(fixed, 4), UNIFORM, 2.0), native)
        theta = learned.to_ns(learned.project(start, native, 2.0), native, 2.0)
        assert float(theta.a[0]) == pytest.approx(1.3, rel=1e-6), learned.label


def test_a_least_squares_fit_starts_there() -> None:
    """Its trajectories begin at the scale, and so does its theta."""
    times = Grid().times(4, POLICY)
    states = torch.stack([noise(6, 2, seed=k) for k in range(5)])
    field = PredictionField(mixture().network("epsilon", POLICY), "epsilon", POLICY)
    assert float(fit(lambda rows: field, noise(6, 2), states, times, batch_size=6).a[0]) == 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="start_scale must be a positive number, got"):
        CondOT(start_scale=scale)
