"""Schedulers whose domain begins after t = 0 and ends before t = 1: everything that samples stays inside it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

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

from orchestrator.models.base import ModelAdapter
from orchestrator.pairs.ground_truth import solve
from solvers.families.base import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import UNIFORM, Grid
from solvers.prediction import PredictionField
from solvers.schedulers import Custom, Scheduler


def root_of_the_rest(t: torch.Tensor) -> torch.Tensor:
    """A noise level whose derivative is infinite at t = 1, as on a variance-preserving path."""
    return torch.sqrt(1 - t**2)


def cut(scheduler: Scheduler) -> Scheduler:
    """``scheduler`` without the first tenth and the last fifth of its domain."""
    span = scheduler.t_max - scheduler.t_min
    return dataclasses.replace(scheduler, t_min=scheduler.t_min + 0.1 * span, t_max=scheduler.t_max - 0.2 * span)


def model_field(native: Scheduler, prediction: Any = "epsilon") -> PredictionField:
    """The field of a perfect network, made as a model adapter makes it."""
    network = mixture().network(prediction, native)
    return PredictionField(network, prediction, native, ModelAdapter.field_scheduler(native))


@pytest.fixture(params=all_schedulers(), ids=lambda scheduler: scheduler.name)
def native(request: pytest.FixtureRequest) -> Scheduler:
    """Each scheduler with both ends cut."""
    return cut(request.param)


def test_the_declared_domain_is_the_domain_of_the_field(native: Scheduler) -> None:
    """Solvers are built on the model's scheduler, and are evaluated on the field's."""
    assert model_field(native).scheduler == ModelAdapter.field_scheduler(native)


def test_a_custom_path_with_an_infinite_end_is_cut_too() -> None:
    """It is presented under CondOT, over the noise levels of its own domain."""
    native = cut(Custom(alpha_function=lambda t: t, sigma_function=root_of_the_rest))
    presented = ModelAdapter.field_scheduler(native)
    assert presented == model_field(native).scheduler
    for end in ("t_min", "t_max"):
        torch.testing.assert_close(
            presented.angle(getattr(presented, end)), native.angle(getattr(native, end)), rtol=1e-12, atol=0
        )


def test_ground_truth_ends_where_the_domain_does(native: Scheduler) -> None:
    """Adaptive ground truth equals plain RK4 between the ends of the domain."""
    field, x0 = model_field(native), noise(4, 2)
    path = field.scheduler
    exact = fine_rk4(field, float(path.sigma(path.t_min)) * x0, path.t_min, path.t_max, 200)
    assert relative_error(solve(field, x0, 1e-6, 1e-6).x1, exact) < 1e-5


def test_every_family_samples_inside_the_domain(native: Scheduler) -> None:
    """The theta of a solver, made from the model's scheduler, gives the solver's samples of the model's field."""
    field, path, x0 = model_field(native), ModelAdapter.field_scheduler(native), noise(4, 2)
    for family, sigma0 in zip(fixed_families(), itertools.cycle((1.0, 2.0)), strict=False):
        solver = GridSolver(family, affordable_nfe(family, 4), UNIFORM, sigma0)
        assert relative_error(solver.to_ns(path).sample(field, x0), solver.sample(field, x0)) < 1e-9, family.label


def test_solvers_converge_to_the_end_of_the_domain(native: Scheduler) -> None:
    """On every grid, with and without preconditioning, many steps give the ground truth."""
    field, path, x0 = model_field(native), ModelAdapter.field_scheduler(native), noise(4, 2)
    exact = solve(field, x0, 1e-7, 1e-7).x1
    for kind, sigma0 in (("uniform", 3.0), ("log_snr", 1.0), ("polynomial", 3.0)):
        theta = GridSolver(Midpoint(), 80, Grid(kind), sigma0).to_ns(path)
        assert relative_error(theta.sample(field, x0), exact) < 5e-3, (kind, sigma0)


def test_learned_families_stay_inside_the_domain(native: Scheduler) -> None:
    """Parameters that were moved at random and projected define a solver that the field accepts."""
    field, path, x0 = model_field(native), ModelAdapter.field_scheduler(native), noise(4, 2)
    for learned, fixed in {
        learned.label: (learned, fixed) for learned, fixed in learnable_starts(allowed=True)
    }.values():
        for sigma0 in (1.0, 2.0):
            start = learned.start(GridSolver(fixed, affordable_nfe(fixed, 4), UNIFORM, sigma0), path)
            moved = learned.project(start + 0.05 * noise(len(start), seed=7), path, sigma0)
            assert bool(learned.to_ns(moved, path, sigma0).sample(field, x0).isfinite().all()), learned.label
