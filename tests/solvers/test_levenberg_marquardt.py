"""Levenberg-Marquardt: faster than Adam, bit-exact resuming, robustness to overflow, and the damped step itself."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from oracles import fine_rk4, learnable_families, mixture, noise, relative_error
from torch import Tensor

from solvers.distil.linear_system import solve_symmetric
from solvers.distil.methods import adam
from solvers.distil.methods.adam import Adam, AdamState, LossAndGradient
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt, LMState, Quadratic, advance, damped_step
from solvers.distil.normal_equations import Jacobian, NormalEquations, evaluations_per_pair, normal_equations
from solvers.distil.pair_field import unconditional
from solvers.distil.state import DIVERGENCE_DB, Status
from solvers.families import GridSolver, LearnableFamily
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family
from solvers.families.bns import BNS
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.families.rk4 import RK4
from solvers.field import FunctionField, VelocityField
from solvers.grids import UNIFORM
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import NSSolver
from solvers.schedulers import VP, CondOT, Scheduler

FIELD = mixture().field(CondOT())
NFE = 4
TRAINING_PAIRS = 64
SETTINGS = LevenbergMarquardt(iterations=12, batch_size=32, training_pairs=TRAINING_PAIRS)


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """(x0, x1) of the mixture's exact ODE: the training pairs first, then 128 validation pairs."""
    x0 = noise(TRAINING_PAIRS + 128, 2)
    return x0, fine_rk4(FIELD, x0, 0.0, 1.0, steps=100)


class Problem:
    """The callbacks of a run on the training pairs, with a count of velocity evaluations per pair."""

    def __init__(self, field: VelocityField = FIELD, precision: torch.dtype | None = None):
        self.field = field
        self.precision = precision
        self.evaluations = 0
        self.jacobians: list[Jacobian] = []
        self.losses: list[float] = []

    def _counted(self) -> FunctionField:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            self.evaluations += len(x)
            return self.field(x, t)

        return FunctionField(velocity, self.field.scheduler)

    def normal(self, solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
        self.jacobians.append(jacobian)
        x0, x1 = (values[indices] for values in pairs())
        return normal_equations(
            solver,
            unconditional(self._counted()),
            x0,
            x1,
            memory_bytes=2**26,
            jacobian=jacobian,
            free=free,
            precision=self.precision,
        )

    @torch.no_grad()
    def loss(self, solver: NSSolver, indices: list[int]) -> float:
        x0, x1 = (values[indices] for values in pairs())
        self.losses.append(float(psnr_loss(solver.sample(self._counted(), x0), x1).mean()))
        return self.losses[-1]


def begin(
    start: Family | None = None,
    nfe: int = NFE,
    sigma0: float = 1.0,
    family: LearnableFamily | None = None,
    settings: LevenbergMarquardt = SETTINGS,
) -> LMState:
    solver = GridSolver(start or Euler(), nfe, UNIFORM, sigma0)
    return LMState.begin((family or BNS()).start(solver, CondOT()), settings)


def run(
    state: LMState,
    steps: int,
    settings: LevenbergMarquardt = SETTINGS,
    sigma0: float = 1.0,
    family: LearnableFamily | None = None,
    problem: Any = None,
    scheduler: Scheduler | None = None,
) -> LMState:
    problem = problem or Problem()
    return advance(state, steps, settings, family or BNS(), scheduler or CondOT(), sigma0, problem.normal, problem.loss)


def validation_psnr(parameters: list[float], sigma0: float = 1.0, family: LearnableFamily | None = None) -> float:
    x0, x1 = (values[TRAINING_PAIRS:] for values in pairs())
    theta = torch.tensor(parameters, dtype=torch.float64)
    with torch.no_grad():
        sample = (family or BNS()).to_ns(theta, CondOT(), sigma0).sample(FIELD, x0)
    return float(psnr_db(per_sample_mse(sample, x1), data_range=2.0).mean())


# --- Learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Euler(), Midpoint(), AdamsBashforth(2)], ids=lambda family: family.label)
@pytest.mark.parametrize("sigma0", [1.0, 2.0])
def test_a_dozen_iterations_gain_ten_db_on_fresh_noise(start: Family, sigma0: float) -> None:
    """From any start, and through the chain rule of a preconditioned path."""
    first = begin(start, sigma0=sigma0)
    last = run(first, 12, sigma0=sigma0)
    assert (last.status, last.iteration) == ("finished", 12)
    assert validation_psnr(last.parameters, sigma0) > validation_psnr(first.parameters, sigma0) + 10


def test_levenberg_marquardt_beats_adam_at_equal_evaluations() -> None:
    """Adam with as many forward evaluations, plus as many backward ones, is 3 dB behind."""
    problem = Problem()
    learned = run(begin(), SETTINGS.iterations, problem=problem)

    def objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        x0, x1 = (values[indices] for values in pairs())
        theta = solver.flat().requires_grad_()
        loss = psnr_loss(NSSolver.from_flat(theta).sample(FIELD, x0), x1).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        return LossAndGradient(float(loss.detach()), gradient)

    batch = 16
    iterations = problem.evaluations // (batch * NFE)
    settings = Adam(learning_rate=5e-3, iterations=iterations, batch_size=batch, training_pairs=TRAINING_PAIRS)
    parameters = torch.tensor(begin().parameters, dtype=torch.float64)
    by_adam = adam.advance(AdamState.begin(parameters), iterations, settings, BNS(), CondOT(), 1.0, objective)
    assert validation_psnr(learned.parameters) > validation_psnr(by_adam.parameters) + 3


@pytest.mark.parametrize("family", learnable_families(), ids=lambda family: family.label)
def test_every_learnable_family_gains(family: LearnableFamily) -> None:
    """The chain rule M^T H M, M = d theta / d parameters, is singular if the family has redundant parameters."""
    start = family_start(family)
    settings = dataclasses.replace(SETTINGS, iterations=6)
    last = run(start, 6, settings, family=family)
    assert all(map(math.isfinite, last.parameters))
    assert validation_psnr(last.parameters, family=family) > validation_psnr(start.parameters, family=family) + 1


def family_start(family: LearnableFamily) -> LMState:
    """The state that starts from the first of a few fixed solvers that the family accepts."""
    refusals = []
    for start in (Midpoint(), Euler(), AdamsBashforth(2), DPMpp2M()):
        try:
            return begin(start, family=family)
        except ValueError as error:
            refusals.append(str(error))
    raise AssertionError(refusals)


def test_an_accepted_step_lowers_the_loss_of_its_batch() -> None:
    """With the whole training set as one batch, the loss falls at every iteration."""
    settings = dataclasses.replace(SETTINGS, batch_size=TRAINING_PAIRS)
    state, losses = begin(), []
    for _ in range(6):
        state = run(state, 1, settings)
        assert state.loss is not None
        losses.append(state.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 2


@pytest.mark.parametrize("jacobian", get_args(Jacobian))
def test_every_jacobian_reaches_the_same_psnr(jacobian: Jacobian) -> None:
    """In float64, finite differences are practically exact."""
    settings = dataclasses.replace(SETTINGS, jacobian=jacobian)
    last, exact = (run(begin(settings=s), 8, s) for s in (settings, dataclasses.replace(SETTINGS, jacobian="jvp")))
    assert validation_psnr(last.parameters) == pytest.approx(validation_psnr(exact.parameters), abs=0.05)


def test_the_reported_evaluations_match_those_made() -> None:
    """Rejected steps count too: each costs one loss, n evaluations per pair."""
    problem = Problem()
    state = run(begin(), 5, problem=problem)
    assert state.evaluations == problem.evaluations
    assert state.evaluations >= 5 * SETTINGS.batch_size * (evaluations_per_pair(NFE, "forward") + NFE)


def test_columns_that_no_parameter_moves_are_not_computed() -> None:
    """A family whose only parameter is the last row's weight of x0: that row is linear and needs only the plain run."""

    class LastRow(BNS):
        def to_ns(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> NSSolver:
            base = GridSolver(Euler(), NFE, UNIFORM).to_ns(scheduler)
            a = torch.cat([base.a[:-1], parameters])
            return NSSolver(base.times, a, base.b)

        def project(self, parameters: Tensor, scheduler: Scheduler, sigma0: float) -> Tensor:
            return parameters

    problem = Problem()
    run(LMState.begin(torch.ones(1, dtype=torch.float64), SETTINGS), 1, family=LastRow(), problem=problem)
    assert problem.evaluations == (1 + len(problem.losses)) * NFE * SETTINGS.batch_size


# --- Resuming ----------------------------------------------------------------------------------------------------


def _through_json(state: LMState) -> LMState:
    return LMState(**json.loads(json.dumps(dataclasses.asdict(state))))


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
@pytest.mark.parametrize("carry", [lambda state: state, _through_json], ids=["in-memory", "through-json"])
def test_two_short_advances_equal_one_long_advance(carry: Callable[[LMState], LMState], sigma0: float) -> None:
    """Bit for bit, even through JSON: a run can stop and resume at any iteration on any host."""
    single = run(begin(sigma0=sigma0), 6, sigma0=sigma0)
    split = run(carry(run(begin(sigma0=sigma0), 3, sigma0=sigma0)), 3, sigma0=sigma0)
    assert dataclasses.replace(split, loss=None) == dataclasses.replace(single, loss=None)
    assert single.parameters != begin(sigma0=sigma0).parameters


def test_a_state_with_validations_survives_a_json_round_trip() -> None:
    state = run(begin().with_validation(20.0), 2).with_validation(31.5)
    assert _through_json(state) == state
    assert [entry["iteration"] for entry in state.validated] == [0, 2]
    assert state.best == {"iteration": 2, "psnr_db": 31.5, "parameters": state.parameters}


def test_a_validation_far_below_the_start_counts_as_divergence() -> None:
    state = begin().with_validation(30.0).with_validation(30.0 - DIVERGENCE_DB - 0.1)
    assert state.status == "diverged"


@pytest.mark.parametrize("status", [status for status in get_args(Status) if status != "running"])
def test_an_ended_run_is_not_advanced(status: Status) -> None:
    state = dataclasses.replace(begin(), status=status)
    assert run(state, 3) is state


# --- Difficult cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Heun(), RK4()], ids=lambda family: family.label)
def test_starts_with_repeated_times_improve(start: Family) -> None:
    """Two evaluations at the same time have similar columns, but not equal ones."""
    first = begin(start)
    assert validation_psnr(run(first, 12).parameters) > validation_psnr(first.parameters) + 10


def test_damping_handles_nearly_collinear_velocities() -> None:
    """At NFE 16 on a smooth field adjacent velocities are nearly collinear, yet theta keeps a usable size."""
    settings = dataclasses.replace(SETTINGS, iterations=4)
    first = begin(nfe=16, settings=settings)
    last = run(first, 4, settings)
    assert max(map(abs, last.parameters)) < 100
    assert validation_psnr(last.parameters) > validation_psnr(first.parameters) + 10


def test_sixteen_pairs_are_enough_to_improve() -> None:
    """Only 32 equations for 17 parameters, with a batch size above the number of pairs."""
    settings = dataclasses.replace(SETTINGS, training_pairs=16, batch_size=64)
    first = begin(settings=settings)
    last = run(first, 8, settings)
    assert validation_psnr(last.parameters) > validation_psnr(first.parameters) + 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_low_precision_network_gains(dtype: torch.dtype) -> None:
    """Its finite differences are rough; the run never gets worse, and the loss comes from the same network."""
    rough = FunctionField(lambda x, t: FIELD(x.to(dtype), t).to(dtype).to(x.dtype), CondOT())
    first = begin()
    last = run(first, 12, problem=Problem(rough, precision=dtype))
    assert all(map(math.isfinite, last.parameters))
    assert validation_psnr(last.parameters) > validation_psnr(first.parameters) + 3


def test_times_stay_in_the_domain() -> None:
    """Times that would leave the domain are held at its ends, and the step is solved again for the rest."""
    state = run(begin(Midpoint(), nfe=8), 12)
    assert all(0 <= t <= 1 for t in state.parameters[:7])


def test_the_time_of_an_infinite_velocity_is_never_queried() -> None:
    """VP's field raises at t = 1: neither a step of theta nor a finite difference evaluates it there."""
    vp = VP()
    field = mixture().field(vp)

    def checked(x: Tensor, t: Tensor) -> Tensor:
        vp.check_velocity_time(t)
        return field(x, t)

    start = LMState.begin(BNS().start(GridSolver(Euler(), NFE, UNIFORM), vp), SETTINGS)
    last = run(start, 6, problem=Problem(FunctionField(checked, vp)), scheduler=vp)
    assert last.loss is not None
    assert last.loss < -2


class _Overflowing(Problem):
    """A problem with non-finite values in its loss, gradient or matrix, or in the loss of every step."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def normal(self, solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
        equations = super().normal(solver, indices, jacobian=jacobian, free=free)
        match self.fault:
            case "loss":
                return dataclasses.replace(equations, loss=math.nan)
            case "gradient":
                return dataclasses.replace(equations, g=equations.g * math.inf)
            case "matrix":
                return dataclasses.replace(equations, h=equations.h * math.nan)
        return equations

    def loss(self, solver: NSSolver, indices: list[int]) -> float:
        return math.nan if self.fault == "step" else super().loss(solver, indices)


@pytest.mark.parametrize("fault", ["loss", "gradient", "matrix"])
def test_persistent_non_finite_values_stall_the_run_at_its_start(fault: str) -> None:
    """It takes three bad batches in a row to end the run; theta is then still the start, and the reason is stored."""
    last = run(begin(), 10, problem=_Overflowing(fault))
    assert (last.status, last.iteration) == ("stalled", 3)
    assert last.parameters == begin().parameters
    assert last.reason is not None
    assert "3 iterations in a row up to 3: the loss or its derivatives are not finite; check" in last.reason


def test_steps_into_overflow_are_rejected_until_the_run_stalls() -> None:
    """Damping rises to its limit, central differences are tried, and then the run stalls."""
    settings = dataclasses.replace(SETTINGS, iterations=60)
    problem = _Overflowing("step")
    last = run(begin(settings=settings), 60, settings, problem=problem)
    assert last.status == "stalled"
    assert last.parameters == begin().parameters
    assert last.damping == settings.damping_max
    assert (problem.jacobians[0], problem.jacobians[-1], last.jacobian) == ("forward", "central", "central")
    assert last.reason is not None
    assert "no step lowers the loss, up to damping 1e+06: theta is as good as the precision" in last.reason


def test_one_bad_batch_does_not_end_a_run() -> None:
    """Its iteration is lost, and the next one continues."""

    class Once(Problem):
        def normal(self, *arguments: Any, **named: Any) -> NormalEquations:
            equations = super().normal(*arguments, **named)
            bad = len(self.jacobians) == 2
            return dataclasses.replace(equations, loss=math.nan) if bad else equations

    last = run(begin(), 4, problem=Once())
    assert (last.status, last.iteration, last.failures) == ("running", 4, 0)
    assert last.loss is not None
    assert math.isfinite(last.loss)


def test_nan_from_the_model_never_reaches_theta() -> None:
    """The model itself returns NaN."""
    broken = FunctionField(lambda x, t: torch.full_like(x, math.nan), CondOT())
    last = run(begin(), 10, problem=Problem(broken))
    assert last.status == "stalled"
    assert all(map(math.isfinite, last.parameters))


def test_an_exact_solver_stalls_unchanged() -> None:
    """On a straight flow Euler has no error: the loss is at its floor, the gradient is zero, and nothing breaks."""
    x0, x1 = pairs()
    still = FunctionField(lambda x, t: torch.zeros_like(x), CondOT())

    class Exact(Problem):
        def normal(self, solver: NSSolver, indices: list[int], *, jacobian: Jacobian, free: Tensor) -> NormalEquations:
            sample = solver.sample(still, x0[indices])
            return normal_equations(
                solver, unconditional(still), x0[indices], sample, memory_bytes=2**24, jacobian=jacobian, free=free
            )

    last = run(begin(), 20, dataclasses.replace(SETTINGS, iterations=20), problem=Exact())
    assert last.status == "stalled"
    assert last.parameters == begin().parameters
    assert x1.shape == x0.shape


def test_a_non_finite_start_is_rejected() -> None:
    with pytest.raises(ValueError, match="1 of 3 starting parameters are not finite; choose another start"):
        LMState.begin(torch.tensor([1.0, math.nan, 0.0], dtype=torch.float64), SETTINGS)


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
        ({"ridge_floor": 0.0}, r"ridge_floor must lie between 0 and 1, got 0\.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**change)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_rejected_step_is_retried_the_configured_number_of_times(retries: int) -> None:
    """Each retry costs one loss and no normal equations."""
    settings = dataclasses.replace(SETTINGS, retries=retries)
    problem = _Overflowing("none")
    rejected: list[NSSolver] = []

    def reject(solver: NSSolver, indices: list[int]) -> float:
        rejected.append(solver)
        return math.inf

    advance(begin(), 1, settings, BNS(), CondOT(), 1.0, problem.normal, reject)
    assert (len(rejected), len(problem.jacobians)) == (1 + retries, 1)


# --- Ordered times -----------------------------------------------------------------------------------------------

ORDERED = BNS(times="ordered")


def test_ordered_times_improve_and_stay_in_order() -> None:
    """Times rise strictly for every parameter vector, with as many parameters as free times have."""
    first = begin(Midpoint(), nfe=8, family=ORDERED)
    assert len(first.parameters) == len(begin(Midpoint(), nfe=8).parameters)
    last = run(first, 8, family=ORDERED)
    times = ORDERED.to_ns(torch.tensor(last.parameters, dtype=torch.float64), CondOT(), 1.0).times
    assert bool((times.diff() > 0).all())
    assert validation_psnr(last.parameters, family=ORDERED) > validation_psnr(first.parameters, family=ORDERED) + 10


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
