"""Levenberg-Marquardt: faster than Adam, robust to overflow, and the damped step itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
import torch
from distillation import FIELD, NFE, TRAINING_PAIRS, Answers, begin, pairs, run, validation_psnr
from oracles import learnable_families, mixture, noise, relative_error
from torch import Tensor

from solvers.distil.linear_system import solve_symmetric
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import LossQuery, NormalQuery
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt, LMState, Quadratic, Sums, damped_step
from solvers.distil.normal_equations import Jacobian, NormalEquations, normal_equations
from solvers.distil.pair_field import unconditional
from solvers.families import GridSolver, LearnableFamily
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family
from solvers.families.bns import BNS
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.field import FunctionField
from solvers.grids import UNIFORM
from solvers.ns import NSSolver
from solvers.schedulers import VP, CondOT, Scheduler

SETTINGS = LevenbergMarquardt(iterations=12, batch_size=32, training_pairs=TRAINING_PAIRS)
START = begin(SETTINGS)


# --- Learning ----------------------------------------------------------------------------------------------------


def test_levenberg_marquardt_beats_adam_at_equal_evaluations() -> None:
    """Adam with as many forward evaluations, plus as many backward ones, is 3 dB behind."""
    answers = Answers()
    learned = run(SETTINGS, START, SETTINGS.iterations, answers=answers)
    batch = 16
    iterations = answers.evaluations // (batch * NFE)
    adam = Adam(learning_rate=5e-3, iterations=iterations, batch_size=batch, training_pairs=TRAINING_PAIRS)
    by_adam = run(adam, begin(adam), iterations)
    assert validation_psnr(learned) > validation_psnr(by_adam) + 3


@pytest.mark.parametrize("family", learnable_families(), ids=lambda family: family.label)
def test_every_learnable_family_gains(family: LearnableFamily) -> None:
    """The chain rule M^T H M, M = d theta / d parameters, is singular if the family has redundant parameters."""
    start = family_start(family)
    settings = dataclasses.replace(SETTINGS, iterations=6)
    last = run(settings, start, 6, family=family)
    assert all(map(math.isfinite, last.parameters))
    assert validation_psnr(last, family=family) > validation_psnr(start, family=family) + 1


def family_start(family: LearnableFamily) -> LMState:
    """The state that starts from the first of a few fixed solvers that the family accepts."""
    refusals = []
    for start in (Midpoint(), Euler(), AdamsBashforth(2), DPMpp2M()):
        try:
            return begin(SETTINGS, start, family=family)
        except ValueError as error:
            refusals.append(str(error))
    raise AssertionError(refusals)


def test_an_accepted_step_lowers_the_loss_of_its_batch() -> None:
    """With the whole training set as one batch, the loss falls at every iteration."""
    settings = dataclasses.replace(SETTINGS, batch_size=TRAINING_PAIRS)
    state, losses = START, []
    for _ in range(6):
        state = run(settings, state, 1)
        assert state.loss is not None
        losses.append(state.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 2


@pytest.mark.parametrize("jacobian", get_args(Jacobian))
def test_every_jacobian_reaches_the_same_psnr(jacobian: Jacobian) -> None:
    """In float64, finite differences are practically exact."""
    settings = dataclasses.replace(SETTINGS, jacobian=jacobian)
    last, exact = (run(s, begin(s), 8) for s in (settings, dataclasses.replace(SETTINGS, jacobian="jvp")))
    assert validation_psnr(last) == pytest.approx(validation_psnr(exact), abs=0.05)


def test_columns_that_no_parameter_moves_are_not_computed() -> None:
    """A family whose only parameter is the last row's weight of x0: that row is linear and needs only the plain run."""

    class LastRow(BNS):
        def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
            base = GridSolver(Euler(), NFE, UNIFORM).to_ns(scheduler)
            a = torch.cat([base.a[:-1], parameters])
            return NSSolver(base.times, a, base.b)

        def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
            return parameters

    answers = Answers()
    run(SETTINGS, SETTINGS.begin(torch.ones(1, dtype=torch.float64)), 1, family=LastRow(), answers=answers)
    assert answers.evaluations == (1 + len(answers.losses)) * NFE * SETTINGS.batch_size


# --- Difficult cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Heun(), RK4()], ids=lambda family: family.label)
def test_starts_with_repeated_times_improve(start: Family) -> None:
    """Two evaluations at the same time have similar columns, but not equal ones."""
    first = begin(SETTINGS, start)
    assert validation_psnr(run(SETTINGS, first, 12)) > validation_psnr(first) + 10


def test_damping_handles_nearly_collinear_velocities() -> None:
    """At NFE 16 on a smooth field adjacent velocities are nearly collinear, yet theta keeps a usable size."""
    settings = dataclasses.replace(SETTINGS, iterations=4)
    first = begin(settings, nfe=16)
    last = run(settings, first, 4)
    assert max(map(abs, last.parameters)) < 100
    assert validation_psnr(last) > validation_psnr(first) + 10


def test_sixteen_pairs_are_enough_to_improve() -> None:
    """Only 32 equations for 17 parameters, with a batch size above the number of pairs."""
    settings = dataclasses.replace(SETTINGS, training_pairs=16, batch_size=64)
    last = run(settings, START, 8)
    assert validation_psnr(last) > validation_psnr(START) + 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_low_precision_network_gains(dtype: torch.dtype) -> None:
    """Its finite differences are rough; the run never gets worse, and the loss comes from the same network."""
    rough = FunctionField(lambda x, t: FIELD(x.to(dtype), t).to(dtype).to(x.dtype), CondOT())
    last = run(SETTINGS, START, 12, answers=Answers(rough, precision=dtype))
    assert all(map(math.isfinite, last.parameters))
    assert validation_psnr(last) > validation_psnr(START) + 3


def test_times_stay_in_the_domain() -> None:
    """Times that would leave the domain are held at its ends, and the step is solved again for the rest."""
    state = run(SETTINGS, begin(SETTINGS, Midpoint(), nfe=8), 12)
    assert all(0 <= t <= 1 for t in state.parameters[:7])


def test_the_time_of_an_infinite_velocity_is_never_queried() -> None:
    """VP's field raises at t = 1: neither a step of theta nor a finite difference evaluates it there."""
    vp = VP()
    field = mixture().field(vp)

    def checked(x: Tensor, t: Tensor) -> Tensor:
        vp.check_velocity_time(t)
        return field(x, t)

    start = begin(SETTINGS, scheduler=vp)
    last = run(SETTINGS, start, 6, answers=Answers(FunctionField(checked, vp)), scheduler=vp)
    assert last.loss is not None
    assert last.loss < -2


class _Overflowing(Answers):
    """Answers with non-finite values in its loss, gradient or matrix, or in the loss of every step."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def normal(self, query: NormalQuery) -> NormalEquations:
        equations = super().normal(query)
        match self.fault:
            case "loss":
                return dataclasses.replace(equations, loss=math.nan)
            case "gradient":
                return dataclasses.replace(equations, g=equations.g * math.inf)
            case "matrix":
                return dataclasses.replace(equations, h=equations.h * math.nan)
        return equations

    def loss(self, query: LossQuery) -> float:
        return math.nan if self.fault == "step" else super().loss(query)


@pytest.mark.parametrize("fault", ["loss", "gradient", "matrix"])
def test_persistent_non_finite_values_stall_the_run_at_its_start(fault: str) -> None:
    """It takes three bad batches in a row to end the run; theta is then still the start, and the reason is stored."""
    last = run(SETTINGS, START, 10, answers=_Overflowing(fault))
    assert (last.status, last.iteration) == ("stalled", 3)
    assert last.parameters == START.parameters
    assert last.reason is not None
    assert "3 iterations in a row up to 3: the loss or its derivatives are not finite; check" in last.reason


def test_steps_into_overflow_are_rejected_until_the_run_stalls() -> None:
    """Damping rises to its limit, central differences are tried, and then the run stalls."""
    settings = dataclasses.replace(SETTINGS, iterations=60)
    answers = _Overflowing("step")
    last = run(settings, begin(settings), 60, answers=answers)
    assert last.status == "stalled"
    assert last.parameters == START.parameters
    assert last.damping == settings.damping_max
    assert (answers.jacobians[0], answers.jacobians[-1], last.jacobian) == ("forward", "central", "central")
    assert last.reason is not None
    assert "no step lowers the loss, up to damping 1e+06: theta is as good as the precision" in last.reason


def test_one_bad_batch_does_not_end_a_run() -> None:
    """Its iteration is lost, and the next one continues."""

    class Once(Answers):
        def normal(self, query: NormalQuery) -> NormalEquations:
            equations = super().normal(query)
            bad = len(self.jacobians) == 2
            return dataclasses.replace(equations, loss=math.nan) if bad else equations

    last = run(SETTINGS, START, 4, answers=Once())
    assert (last.status, last.iteration, last.failures) == ("running", 4, 0)
    assert last.loss is not None
    assert math.isfinite(last.loss)


def test_an_exact_solver_stalls_unchanged() -> None:
    """On a straight flow Euler has no error: the loss is at its floor, the gradient is zero, and nothing breaks."""
    x0, _ = pairs()
    still = FunctionField(lambda x, t: torch.zeros_like(x), CondOT())

    class Exact(Answers):
        def normal(self, query: NormalQuery) -> NormalEquations:
            noise = x0[query.indices]
            sample = query.solver.sample(still, noise)
            field = unconditional(still)
            return normal_equations(query.solver, field, noise, sample, memory_bytes=2**24, free=query.free)

    last = run(dataclasses.replace(SETTINGS, iterations=20), START, 20, answers=Exact())
    assert last.status == "stalled"
    assert last.parameters == START.parameters


# --- Damped step -------------------------------------------------------------------------------------------------


def _keep(parameters: Tensor) -> Tensor:
    return parameters


def _random_model(size: int, rank: int | None = None) -> Quadratic:
    columns = noise(rank or size, size)
    h = columns.T @ columns
    return Quadratic(h, h @ noise(size, seed=1))


def test_without_damping_the_step_is_a_gauss_newton_step() -> None:
    """(H + 0) delta = -g."""
    model = _random_model(6)
    step = damped_step(torch.zeros(6, dtype=torch.float64), model, 1e-14, 1e-15, _keep)
    assert relative_error(step, -torch.linalg.solve(model.h, model.g)) < 1e-8


def test_a_large_damping_gives_a_short_scaled_gradient_step() -> None:
    """delta -> -g / (lambda diag H)."""
    model = _random_model(6)
    step = damped_step(torch.zeros(6, dtype=torch.float64), model, 1e8, 1e-12, _keep)
    assert relative_error(1e8 * step, -model.g / model.h.diagonal()) < 1e-6


def test_the_step_does_not_depend_on_the_units_of_the_parameters() -> None:
    """Damping scales with the diagonal (Marquardt), so parameters of size 1e-6 and 1e6 are treated alike."""
    model, units = _random_model(5), torch.logspace(-6, 6, 5, dtype=torch.float64)
    scaled = Quadratic(model.h * units[:, None] * units, model.g * units)
    zero = torch.zeros(5, dtype=torch.float64)
    plain, rescaled = (damped_step(zero, m, 0.1, 1e-30, _keep) for m in (model, scaled))
    assert relative_error(rescaled * units, plain) < 1e-6


def test_redundant_parameters_get_a_finite_step() -> None:
    """A 6 x 6 matrix of rank 3, with one parameter that has no effect at all."""
    model = _random_model(6, rank=3)
    model.h[2], model.h[:, 2], model.g[2] = 0.0, 0.0, 0.0
    step = damped_step(torch.zeros(6, dtype=torch.float64), model, 1e-8, 1e-12, _keep)
    assert bool(torch.isfinite(step).all())
    assert float(step[2]) == 0.0


def test_the_step_is_optimal_for_the_other_parameters_if_one_is_at_its_bound() -> None:
    """The minimum of the quadratic over x_0 <= 0; clipping the unconstrained minimum would misplace x_1."""
    h = torch.tensor([[2.0, 1.8], [1.8, 2.0]], dtype=torch.float64)
    model = Quadratic(h, torch.tensor([-1.0, 0.0], dtype=torch.float64))

    def at_most_zero(parameters: Tensor) -> Tensor:
        return torch.cat([parameters[:1].clamp(max=0.0), parameters[1:]])

    step = damped_step(torch.zeros(2, dtype=torch.float64), model, 1e-12, 1e-12, at_most_zero)
    assert step.tolist() == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_matrix_made_indefinite_by_rounding_is_solved_by_its_eigenvalues() -> None:
    """Cholesky fails on it; the least-norm solution on its range is finite."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-17]], dtype=torch.float64)
    solution = solve_symmetric(matrix, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert solution.tolist() == pytest.approx([1.0, 1.0])


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"training_pairs": -1}, "training_pairs must be at least 1, got -1"),
        ({"jacobian": "exact"}, "unknown jacobian 'exact'; choose one of forward, central, jvp"),
        ({"damping": 0.0}, "damping must satisfy 0 < damping_min <= damping <= damping_max, got"),
        ({"damping": math.nan}, "damping must satisfy"),
        ({"damping_max": 1e-9}, "damping must satisfy"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
        ({"batch_growth": 1.2}, r"batch_growth 1\.2 needs first_batch_size, the pairs to grow from"),
        (
            {"first_batch_size": 64, "batch_growth": 1.2},
            "first_batch_size must be at least 1 and less than batch_size 64",
        ),
        ({"first_batch_size": 8}, r"batch_growth must be more than 1 and at most 10, got 1\.0"),
        ({"damping_factor": 1.5}, r"damping_factor must be more than 0 and at most 1, got 1\.5"),
        ({"memory_share": 1.0}, r"memory_share must be at least 0 and less than 1, got 1\.0"),
        ({"memory_pairs": 0}, "memory_pairs must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"ridge_floor": 0.0}, r"ridge_floor must lie between 0 and 1, got 0\.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training_pairs": 8},
            "17 numbers from 8 pairs of 2 dimensions, which have only 16 residuals; set training_pai",
        ),
        (
            {"batch_size": 8},
            "17 numbers from 8 pairs of 2 dimensions, which have only 16 residuals; set batch_size to at",
        ),
    ],
    ids=str,
)
def test_fewer_residuals_than_numbers_are_refused(change: dict[str, Any], message: str) -> None:
    """With the number of pairs that is enough: 9 pairs of 2 dimensions for BNS's 17 numbers at NFE 4."""
    with pytest.raises(ValueError, match=message + r".* least 9, or use method 'adam'"):
        dataclasses.replace(SETTINGS, **change).check_pairs(17, 2)
    dataclasses.replace(SETTINGS, **dict.fromkeys(change, 9)).check_pairs(17, 2)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_rejected_step_is_retried_the_configured_number_of_times(retries: int) -> None:
    """Each retry costs one loss and no normal equations."""
    settings = dataclasses.replace(SETTINGS, retries=retries)
    answers = _Overflowing("step")
    run(settings, START, 1, answers=answers)
    assert (len(answers.losses), len(answers.jacobians)) == (1 + retries, 1)


# --- Ordered times -----------------------------------------------------------------------------------------------

ORDERED = BNS(times="ordered")


def test_ordered_times_improve_and_stay_in_order() -> None:
    """Times rise strictly for every parameter vector, with as many parameters as free times have."""
    first = begin(SETTINGS, Midpoint(), nfe=8, family=ORDERED)
    assert len(first.parameters) == len(begin(SETTINGS, Midpoint(), nfe=8).parameters)
    last = run(SETTINGS, first, 8, family=ORDERED)
    times = ORDERED.to_ns(torch.tensor(last.parameters, dtype=torch.float64), CondOT(), 1.0).times
    assert bool((times.diff() > 0).all())
    assert validation_psnr(last, family=ORDERED) > validation_psnr(first, family=ORDERED) + 10


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_ordered_times_start_from_the_given_solver(sigma0: float) -> None:
    solver = GridSolver(AdamsBashforth(2), 5, UNIFORM, sigma0)
    parameters = ORDERED.start(solver, CondOT())
    flat = ORDERED.to_ns(parameters, CondOT(), sigma0).flat()
    assert relative_error(flat, solver.to_ns(CondOT()).flat()) < 1e-12
    assert relative_error(ORDERED.project(parameters, CondOT(), sigma0), parameters) < 1e-12


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (RK4(), r"BNS with ordered times learns times that rise strictly, but t=0.25 is followed by t=0.25; sta"),
        (Heun(), r"rise strictly, but t=0.5 is followed by t=0.5; start from a solver and a grid whose times rise"),
    ],
    ids=["RK4", "Heun"],
)
def test_ordered_times_reject_a_start_with_ties(start: Family, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ORDERED.start(GridSolver(start, 4 if isinstance(start, Heun) else 8, UNIFORM), CondOT())


def test_ordered_times_reject_an_unordered_start() -> None:
    solver = GridSolver(Euler(), 3, UNIFORM).to_ns(CondOT())
    shuffled = NSSolver(solver.times[[0, 2, 1]], solver.a, solver.b)
    with pytest.raises(ValueError, match=r"rise strictly, but t=0.666667 is followed by t=0.333333"):
        ORDERED.start_from(shuffled, CondOT())


def test_an_unknown_kind_of_times_is_rejected() -> None:
    with pytest.raises(ValueError, match="BNS takes times 'free' or 'ordered', got 'sorted'"):
        BNS(times="sorted")  # type: ignore[arg-type]


def test_an_unusual_beginning_is_learned_along_with_theta() -> None:
    """BNS fixes t_0 and a_0 if they are the usual ones, and learns them otherwise."""
    solver = GridSolver(Euler(), 3, UNIFORM).to_ns(CondOT())
    scaled = NSSolver(solver.times, solver.a * 1.5, solver.b)
    assert torch.equal(BNS().to_ns(BNS().start_from(scaled, CondOT()), CondOT(), 1.0).flat(), scaled.flat())


# --- Memory of earlier batches -----------------------------------------------------------------------------------


def test_memory_keeps_small_batches_from_fitting_their_own_pairs() -> None:
    """With 9 pairs of 2 dimensions for 17 numbers, each step would fit its own batch."""
    alone = dataclasses.replace(SETTINGS, batch_size=9)
    remembering = dataclasses.replace(alone, memory_share=0.8)
    by_memory, by_batch = (run(settings, begin(settings), 12) for settings in (remembering, alone))
    assert validation_psnr(by_memory) > validation_psnr(by_batch) + 1
    faded = dataclasses.replace(remembering, memory_pairs=9)
    assert run(faded, begin(faded), 3).parameters == run(alone, begin(alone), 3).parameters


def test_sums_survive_a_round_trip_and_move_with_a_quadratic_model() -> None:
    """After a step, the gradient is that of the quadratic model; the earlier sums count by their share."""
    h = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    sums = Sums(h, torch.tensor([1.0, -1.0], dtype=torch.float64), 4)
    restored = Sums.of(sums.as_lists())
    assert torch.equal(restored.h, sums.h)
    assert torch.equal(restored.g, sums.g)
    moved = sums.moved(-torch.linalg.solve(sums.h, sums.g))
    torch.testing.assert_close(moved.g, torch.zeros_like(moved.g))
    mean = sums.with_earlier(moved, 0.5).mean()
    torch.testing.assert_close(mean.h, 1.5 * h / 6)
