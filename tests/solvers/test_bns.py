"""BNS parameters: fixed or learned beginnings, projection, and ordered times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation import begin, run, validation_psnr
from oracles import noise, nonlinear_field

from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.families._learned import last_time
from solvers.families.base import GridSolver
from solvers.families.bns import BNS, Beginning
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.grids import Grid
from solvers.scale_time import SchedulerChange
from solvers.schedulers import EDM, VP, CondOT, Cosine, DiscreteVP, Scheduler

EDM_GRID = Grid("edm")


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_a_start_that_begins_late_makes_its_first_time_and_state_learnable(sigma0: float) -> None:
    """EDM's grid starts at sigma/alpha = 80, i.e. t = 1/81 on cond_ot: t_0 and a_0 become parameters."""
    field = nonlinear_field(CondOT())
    solver = GridSolver(Euler(), 5, EDM_GRID, sigma0)
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
        learned = BNS().start(GridSolver(Euler(), nfe, EDM_GRID), scheduler)
        assert len(learned) == len(fixed) + 2
        assert BNS().to_ns(learned, scheduler, 1.0).nfe == nfe


def test_a_learned_first_time_stays_in_the_domain() -> None:
    """The projection covers it like every other time, and the weight of x0 in the first state stays positive."""
    scheduler = CondOT()
    parameters = BNS().start(GridSolver(Euler(), 3, EDM_GRID), scheduler)
    projected = BNS().project(parameters - 1, scheduler, 1.0)
    assert (projected[:3] == 0).all()
    assert float(projected[3]) == 0.1
    torch.testing.assert_close(projected[4:], parameters[4:] - 1)


PATHS: list[Scheduler] = [
    CondOT(),
    CondOT(t_min=0.1, start_scale=1.0),
    Cosine(t_min=0.05),
    VP(t_min=0.02, t_max=0.999),
    DiscreteVP(t_max=0.99),
    EDM(),
    SchedulerChange(DiscreteVP(), CondOT()).target,
]


@pytest.mark.parametrize("sigma0", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beginning", ["time", "free"])
@pytest.mark.parametrize("scheduler", PATHS, ids=lambda scheduler: f"{scheduler.name} from {scheduler.t_min:.3g}")
def test_a_learned_beginning_stays_on_every_path(scheduler: Scheduler, beginning: Beginning, sigma0: float) -> None:
    """Wherever a step leads, the field is queried in its domain; the weight of x0 is positive, with 'time' as usual."""
    family = BNS(beginning=beginning)
    start = family.start(GridSolver(Midpoint(), 4, Grid(), sigma0), scheduler)
    for step in (0.0, -1.0, 1.0):
        solver = family.to_ns(family.project(start + step, scheduler, sigma0), scheduler, sigma0)
        scheduler.check_velocity_time(solver.times)
        usual = float(scheduler.start(scheduler.t_min))
        assert float(solver.times[0]) > scheduler.t_min or step < 0
        assert float(solver.times.max()) <= last_time(scheduler)
        assert float(solver.a[0]) > 0
        if beginning == "time":
            assert float(solver.a[0]) == pytest.approx(usual, rel=1e-9)


def test_ordered_times_reject_a_start_that_begins_late() -> None:
    """Their parametrisation always begins at t_min."""
    with pytest.raises(ValueError, match=r"BNS \(ordered times\) starts at t=0 from 1 x0, this solver at t=0.012"):
        BNS("ordered").start(GridSolver(Euler(), 3, EDM_GRID), CondOT())


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


@pytest.mark.parametrize(("beginning", "learned"), [("time", 1), ("free", 2)])
@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_a_learned_beginning_starts_a_little_inside_the_domain(
    beginning: Beginning, learned: int, sigma0: float
) -> None:
    """Noise of its level comes first, by the exact flow; the steps after it shrink by the same factor."""
    scheduler = CondOT()
    family, solver = BNS(beginning=beginning), GridSolver(Midpoint(), 4, Grid(), sigma0)
    parameters = family.start(solver, scheduler)
    assert len(parameters) == BNS().freedom(4) + learned == family.freedom(4)
    moved, held = (f.to_ns(f.start(solver, scheduler), scheduler, sigma0) for f in (family, BNS()))
    if sigma0 == 1:
        torch.testing.assert_close(moved.times, 0.05 + 0.95 * held.times)
        torch.testing.assert_close(moved.b, 0.95 * held.b)
        assert float(moved.a[0]) == (1 if beginning == "time" else pytest.approx(0.95))
        torch.testing.assert_close(moved.a[1:], held.a[1:] - 0.05)
    projected = family.project(parameters - 1, scheduler, sigma0)
    assert (projected[:4] == 0).all()
    assert torch.equal(projected[5:], (parameters - 1)[5:])


def test_learning_the_beginning_pays_at_few_evaluations() -> None:
    """The first velocity from pure noise is the same for all samples but for their noise: it is worth moving."""
    method = LevenbergMarquardt(batch_size=64, training_pairs=64)
    scores = {}
    for beginning in ("held", "time", "free"):
        family = BNS(beginning=beginning)
        state = run(method, begin(method, Midpoint(), nfe=2, family=family), 15, family=family)
        scores[beginning] = validation_psnr(state, family=family)
        theta = family.to_ns(torch.tensor(state.parameters, dtype=torch.float64), CondOT(), 1.0)
        assert (float(theta.a[0]) == 1) == (beginning != "free")
        assert (float(theta.times[0]) == 0) == (beginning == "held")
    assert min(scores["free"], scores["time"]) > scores["held"] + 0.5


def test_a_start_elsewhere_keeps_its_beginning_where_both_are_learned() -> None:
    """'time' refuses it, because a_0 could not be kept."""
    solver = GridSolver(Euler(), 3, EDM_GRID)
    free = BNS(beginning="free")
    assert torch.equal(free.start(solver, CondOT()), BNS().start(solver, CondOT()))
    with pytest.raises(ValueError, match=r"BNS, free first time starts at t=0 from 1 x0, this solver at t=0.012"):
        BNS(beginning="time").start(solver, CondOT())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"beginning": "open"}, "BNS takes beginning 'held', 'time' or 'free', got 'open'"),
        ({"beginning": "free", "times": "ordered"}, "BNS with ordered times begins at t_min, but beginning is 'free'"),
    ],
)
def test_a_beginning_that_cannot_be_learned_is_refused(options: dict[str, Any], problem: str) -> None:
    """The message names the option and its value."""
    with pytest.raises(ValueError, match=problem):
        BNS(**options)
