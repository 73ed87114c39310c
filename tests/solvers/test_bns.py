"""BNS parameters: fixed or learned beginnings, projection, and ordered times."""

from __future__ import annotations

import pytest
import torch
from oracles import noise, nonlinear_field

from solvers.families.base import GridSolver
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.grids import Grid
from solvers.schedulers import CondOT

EDM = Grid("edm")


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_a_start_that_begins_late_makes_its_first_time_and_state_learnable(sigma0: float) -> None:
    """EDM's grid starts at sigma/alpha = 80, i.e. t = 1/81 on cond_ot: t_0 and a_0 become parameters."""
    field = nonlinear_field(CondOT())
    solver = GridSolver(Euler(), 5, EDM, sigma0)
    parameters = BNS().start(solver, field.scheduler)
    assert len(parameters) == 5 * 10 // 2 + 1
    theta = BNS().to_ns(parameters, field.scheduler, sigma0)
    assert float(theta.times[0]) > 0.01
    x0 = noise(3, 4)
    torch.testing.assert_close(theta.sample(field, x0), solver.sample(field, x0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nfe", range(1, 30))
def test_the_parameter_count_determines_whether_the_beginning_is_learned(nfe: int) -> None:
    """n(n+5)/2 - 1 with a fixed beginning and two more with a learned one; no length is ambiguous."""
    scheduler = CondOT()
    fixed = BNS().start(GridSolver(Euler(), nfe, Grid()), scheduler)
    assert len(fixed) == nfe * (nfe + 5) // 2 - 1
    assert BNS().to_ns(fixed, scheduler, 1.0).nfe == nfe
    if nfe > 1:
        learned = BNS().start(GridSolver(Euler(), nfe, EDM), scheduler)
        assert len(learned) == len(fixed) + 2
        assert BNS().to_ns(learned, scheduler, 1.0).nfe == nfe


def test_a_learned_first_time_stays_in_the_domain() -> None:
    """The projection covers it like every other time."""
    scheduler = CondOT()
    parameters = BNS().start(GridSolver(Euler(), 3, EDM), scheduler)
    projected = BNS().project(parameters - 1, scheduler, 1.0)
    assert (projected[:3] == 0).all()
    torch.testing.assert_close(projected[3:], parameters[3:] - 1)


def test_ordered_times_reject_a_start_that_begins_late() -> None:
    """Their parametrisation always begins at t_min."""
    with pytest.raises(ValueError, match=r"BNS \(ordered times\) starts at t=0 from 1 x0, this solver at t=0.012"):
        BNS("ordered").start(GridSolver(Euler(), 3, EDM), CondOT())


def test_unknown_times_are_rejected() -> None:
    """The message lists the valid options."""
    with pytest.raises(ValueError, match="BNS takes times 'free' or 'ordered', got 'sorted'"):
        BNS("sorted")  # type: ignore[arg-type]


def test_ordered_times_reject_ties_that_free_times_accept() -> None:
    """Ordered times are learned as log step sizes: Midpoint's times rise strictly, RK4's repeat."""
    scheduler = CondOT()
    ordered = BNS("ordered")
    rising, repeating = GridSolver(Midpoint(), 4, Grid()), GridSolver(RK4(), 4, Grid())
    theta = ordered.to_ns(ordered.start(rising, scheduler), scheduler, 1.0)
    torch.testing.assert_close(theta.flat(), rising.to_ns(scheduler).flat())
    with pytest.raises(ValueError, match=r"times that rise strictly, but t=0.5 is followed by t=0.5"):
        ordered.start(repeating, scheduler)
    assert torch.equal(
        BNS().to_ns(BNS().start(repeating, scheduler), scheduler, 1.0).flat(), repeating.to_ns(scheduler).flat()
    )
