"""Parameters that a test of the solvers asks for by name: it then runs for every plugin there is."""

from __future__ import annotations

import pytest
import torch
from oracles import fixed_families, schedulers_found

from solvers.families.base import Family
from solvers.grids import Grid
from solvers.schedulers import Scheduler

torch.set_num_threads(1)


@pytest.fixture(params=fixed_families(), ids=lambda family: family.label)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family that is not learned, with each of its options."""
    return request.param


@pytest.fixture(params=schedulers_found(), ids=lambda scheduler: scheduler.name)
def scheduler(request: pytest.FixtureRequest) -> Scheduler:
    """Each scheduler, with its default settings."""
    return request.param


@pytest.fixture(
    params=[Grid(), Grid("warped", p=1.6, q=1.2), Grid("log_snr"), Grid("polynomial")], ids=lambda grid: grid.kind
)
def grid(request: pytest.FixtureRequest) -> Grid:
    """One time grid of each kind."""
    return request.param


@pytest.fixture(params=[1.0, 2.0, 5.0, 10.0], ids=lambda sigma0: f"sigma0={sigma0:g}")
def sigma0(request: pytest.FixtureRequest) -> float:
    """The papers' preconditionings, and none."""
    return request.param
