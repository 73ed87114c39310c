"""Fixtures that run a solver test once per family, scheduler, time grid or sigma0."""

from __future__ import annotations

import pytest
import torch
from oracles import all_schedulers, fixed_families

from solvers.families.base import Family
from solvers.grids import Grid
from solvers.schedulers import Scheduler

torch.set_num_threads(1)


@pytest.fixture(params=fixed_families(), ids=lambda family: family.label)
def family(request: pytest.FixtureRequest) -> Family:
    """Each fixed family, with each of its options."""
    return request.param


@pytest.fixture(params=all_schedulers(), ids=lambda scheduler: scheduler.name)
def scheduler(request: pytest.FixtureRequest) -> Scheduler:
    """Each scheduler with its default settings."""
    return request.param


@pytest.fixture(
    params=[Grid(), Grid("warped", p=1.6, q=1.2), Grid("log_snr"), Grid("polynomial")], ids=lambda grid: grid.kind
)
def grid(request: pytest.FixtureRequest) -> Grid:
    """One time grid of each kind."""
    return request.param


@pytest.fixture(params=[1.0, 2.0, 5.0, 10.0], ids=lambda sigma0: f"sigma0={sigma0:g}")
def sigma0(request: pytest.FixtureRequest) -> float:
    """The papers' preconditionings, and 1 for none."""
    return request.param
