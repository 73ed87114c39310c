"""Bespoke scale-time solvers: the solvers they represent, their losses as bounds on the sample error, and learning."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from oracles import central_difference, fine_rk4, mixture, noise, nonlinear_field, relative_error
from torch import Tensor

from solvers.distil.bespoke import StepwiseFamily, lte_loss, rmse_bound_loss, x_aux
from solvers.distil.drive import drive
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import GradientQuery, LossAndGradient, Problem
from solvers.families._bespoke import BespokeRungeKutta, ScaleTimeNodes
from solvers.families.base import GridSolver
from solvers.families.bespoke_rk1 import BespokeRK1
from solvers.families.bespoke_rk2 import BespokeRK2
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.midpoint import Midpoint
from solvers.field import CountingField, FunctionField, VelocityField
from solvers.grids import UNIFORM, Grid
from solvers.losses import per_sample_mse, rmse_loss
from solvers.ns import NSSolver
from solvers.scale_time import SchedulerChange, TransformedField, precondition
from solvers.schedulers import VP, CondOT, Cosine, Scheduler
from solvers.trajectory import DensePath

LEARN = ("both", "time", "scale")
ALL_VARIANTS: list[BespokeRungeKutta] = [kind(learn) for kind in (BespokeRK1, BespokeRK2) for learn in LEARN]
WARPED = Grid("warped", p=1.6, q=1.2)

#: The domain of a VP epsilon network presented under CondOT: its noise end keeps a trace of the data.
CUT = CondOT(t_min=0.0066)

all_variants = pytest.mark.parametrize("bespoke", ALL_VARIANTS, ids=lambda family: family.label)
full_variants = pytest.mark.parametrize("bespoke", [BespokeRK1(), BespokeRK2()], ids=lambda family: family.label)
on_schedulers = pytest.mark.parametrize("scheduler", [CondOT(), Cosine(), VP(), CUT], ids=["ot", "cs", "vp", "cut"])
preconditioned = pytest.mark.parametrize("sigma0", [1.0, 0.5, 3.0])


def identity(family: BespokeRungeKutta, steps: int, grid: Grid = UNIFORM, sigma0: float = 1.0) -> GridSolver:
    """The plain method with the given number of steps."""
    return GridSolver(family.base, steps * family.stages, grid, sigma0)


def perturbed(family: BespokeRungeKutta, steps: int, size: float = 0.2, seed: int = 0) -> Tensor:
    """The identity's parameters plus random noise."""
    start = family.start(identity(family, steps), CondOT())
    return start + size * noise(len(start), seed=seed)


def dense_path(field: VelocityField, start: Tensor, knots: int = 129) -> DensePath:
    """The exact solution from ``start`` at t_min on uniform knots, accurate to about 1e-9."""
    times = torch.linspace(field.scheduler.t_min, field.scheduler.t_max, knots, dtype=torch.float64)
    states = [start]
    for t, t_next in itertools.pairwise(times.tolist()):
        states.append(fine_rk4(field, states[-1], t, t_next, steps=1))
    velocities = [field(x, t) for x, t in zip(states, times, strict=True)]
    return DensePath(times.repeat(len(start), 1), torch.stack(states, 1), torch.stack(velocities, 1))


def jacobian_rank(function: Callable[[Tensor], Tensor], at: Tensor) -> int:
    jacobian = torch.autograd.functional.jacobian(function, at)
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


# --- Parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("bespoke", "count"),
    [
        (BespokeRK1(), lambda n: 4 * n - 1),
        (BespokeRK1("time"), lambda n: 2 * n - 1),
        (BespokeRK1("scale"), lambda n: 2 * n),
        (BespokeRK2(), lambda n: 8 * n - 1),
        (BespokeRK2("time"), lambda n: 4 * n - 1),
        (BespokeRK2("scale"), lambda n: 4 * n),
    ],
    ids=lambda value: value.label if isinstance(value, BespokeRungeKutta) else "",
)
def test_the_parameter_count_matches_the_paper_and_determines_the_steps(
    bespoke: BespokeRungeKutta, count: Callable[[int], int], n: int
) -> None:
    """BST eq. 18 and 21: 4n - 1 and 8n - 1, less the half that an ablation freezes."""
    parameters = bespoke.start(identity(bespoke, n), CondOT())
    assert len(parameters) == count(n)
    assert bespoke.to_ns(parameters, CondOT(), 1.0).nfe == n * bespoke.stages


@all_variants
def test_no_parameter_is_redundant_in_the_transform(bespoke: BespokeRungeKutta) -> None:
    """The map to (t, t', s, s') has full rank; with all m increments of eq. 73 the rank would be one less."""
    parameters = perturbed(bespoke, 3)

    def flat_transform(values: Tensor) -> Tensor:
        return torch.cat(list(bespoke.transform(values, CondOT())))

    assert jacobian_rank(flat_transform, parameters) == len(parameters)


@pytest.mark.parametrize(
    ("bespoke", "rank"), [(BespokeRK1(), 3 * 3 - 1), (BespokeRK2(), 7 * 3 - 1)], ids=["RK1", "RK2"]
)
def test_different_transforms_can_give_the_same_solver(bespoke: BespokeRungeKutta, rank: int) -> None:
    """The NS form has 3n - 1 (7n - 1) degrees of freedom; a second-order method must damp the remaining directions."""

    def theta(parameters: Tensor) -> Tensor:
        return bespoke.to_ns(parameters, CondOT(), 1.0).flat()

    assert jacobian_rank(theta, perturbed(bespoke, 3)) == rank


def test_the_parametrisation_matches_a_hand_computation() -> None:
    """Eq. 73-75, corrected, at n = 3: time increments 2, (1), 3; s_0 = 1; s' is the parameter, nodes hold s'/s."""
    theta = [-2.0, 3.0, 0.5, -1.5, 2.0, math.log(2), math.log(4), math.log(8), 0.1, 0.2, -0.4]
    nodes = BespokeRK1().transform(torch.tensor(theta, dtype=torch.float64), CondOT())
    assert nodes.t.tolist() == pytest.approx([0, 2 / 6, 3 / 6, 1])
    assert nodes.d_t.tolist() == pytest.approx([0.5, 1.5, 2.0])
    assert nodes.s.tolist() == pytest.approx([1, 2, 4, 8])
    assert nodes.d_log_s.tolist() == pytest.approx([0.1, 0.1, -0.1])


@all_variants
def test_the_identity_has_ones_for_the_time_and_zeros_for_the_scale(bespoke: BespokeRungeKutta) -> None:
    """Eq. 78-79, the start of all_variants training run in the paper."""
    start = bespoke.start(identity(bespoke, 4), CondOT())
    m = 4 * bespoke.stages
    time, scale = torch.ones(2 * m - 1, dtype=torch.float64), torch.zeros(2 * m, dtype=torch.float64)
    expected = {"both": torch.cat([time, scale]), "time": time, "scale": scale}[bespoke.learn]
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-13)


@full_variants
def test_parameters_of_inverts_transform(bespoke: BespokeRungeKutta) -> None:
    """Checked on a domain that does not begin at 0."""
    nodes = bespoke.transform(perturbed(bespoke, 3), CUT)
    parameters = bespoke.parameters_of(nodes.t, nodes.s, nodes.d_t, nodes.d_log_s * nodes.s[:-1], CUT)
    for value, expected in zip(bespoke.transform(parameters, CUT), nodes, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@all_variants
@on_schedulers
@pytest.mark.parametrize("sigma0", [1.0, 3.0])
def test_times_rise_inside_the_domain_for_any_parameters(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """The parametrisation guarantees order and domain; only VP's infinite end needs the projection."""
    for seed in range(3):
        wild = perturbed(bespoke, 4, size=3.0, seed=seed)
        nodes = bespoke.transform(bespoke.project(wild, scheduler, sigma0), scheduler, sigma0)
        assert bool((nodes.t.diff() >= 0).all())
        assert float(nodes.t[-1]) == pytest.approx(scheduler.t_max, abs=1e-12)
        for t in nodes.t[:-1]:
            scheduler.check_velocity_time(t)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("learn", ["both", "time"])
@full_variants
def test_projection_keeps_the_last_query_away_from_an_infinite_velocity(
    bespoke: BespokeRungeKutta, learn: str, steps: int
) -> None:
    """On VP a tiny last increment queries t = 1; projected, the last query is at 1 - 1e-4 and stays there."""
    family = type(bespoke)(learn)
    parameters = family.start(identity(family, steps), CondOT())
    m = steps * family.stages
    if m == 1:
        assert torch.equal(family.project(parameters, VP(), 1.0), parameters)
        return
    if m == 2:  # the last increment is fixed at 1, so the first one is made huge instead
        parameters[0] = -1e12
    else:
        parameters[m - 2] = -1e-12
    with pytest.raises(ValueError, match="velocity of the vp scheduler is infinite at t=1"):
        family.to_ns(parameters, VP(), 1.0)
    projected = family.project(parameters, VP(), 1.0)
    assert float(family.to_ns(projected, VP(), 1.0).times.max()) == pytest.approx(1 - 1e-4, abs=1e-9)
    torch.testing.assert_close(family.project(projected, VP(), 1.0), projected, rtol=1e-12, atol=0)
    assert torch.equal(family.project(parameters, CondOT(), 1.0), parameters)


# --- Solver ------------------------------------------------------------------------------------------------------


@all_variants
@on_schedulers
@preconditioned
@pytest.mark.parametrize("grid", [UNIFORM, WARPED], ids=lambda grid: grid.kind)
def test_the_start_is_the_plain_method_on_any_grid(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float, grid: Grid
) -> None:
    """The identity on the uniform grid; elsewhere only the time is transformed, dt/dr = n (t_{i+1} - t_i)."""
    solver = identity(bespoke, 3, grid, sigma0)
    if bespoke.learn == "scale" and grid != UNIFORM:
        with pytest.raises(
            ValueError, match=f"{bespoke.label} keeps the time at t = r and cannot equal .* non-uniform"
        ):
            bespoke.start(solver, scheduler)
        return
    theta = bespoke.to_ns(bespoke.start(solver, scheduler), scheduler, sigma0)
    expected = solver.to_ns(scheduler)
    torch.testing.assert_close(theta.flat(), expected.flat(), rtol=1e-11, atol=1e-11)


@all_variants
@on_schedulers
@preconditioned
def test_direct_sampling_equals_sampling_of_the_non_stationary_form(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """BST Algorithm 4 and BNS Algorithm 1 give the same sample for any parameters (BNS Theorem 3.2)."""
    parameters, field, x0 = perturbed(bespoke, 3), nonlinear_field(scheduler), noise(4, 3)
    direct = bespoke.sample(parameters, field, x0, sigma0)
    assert relative_error(bespoke.to_ns(parameters, scheduler, sigma0).sample(field, x0), direct) < 2e-11


def _by_hand(bespoke: BespokeRungeKutta, nodes: ScaleTimeNodes, field: VelocityField, x: Tensor) -> Tensor:
    """Algorithm 2 with eq. 17 (RK1) or eq. 19-20 (RK2), transcribed literally; RK2 has nodes at half steps."""
    t, s, dt, ds = nodes.t, nodes.s, nodes.d_t, nodes.d_log_s * nodes.s[:-1]
    n = len(dt) // bespoke.stages
    h = 1 / n
    for i in range(n):
        if bespoke.stages == 1:
            x = (s[i] + h * ds[i]) / s[i + 1] * x + h * dt[i] * s[i] / s[i + 1] * field(x, t[i])
            continue
        k, half, after = 2 * i, 2 * i + 1, 2 * i + 2
        z = (s[k] + h / 2 * ds[k]) * x + h / 2 * s[k] * dt[k] * field(x, t[k])
        inner = ds[half] / s[half] * z + dt[half] * s[half] * field(z / s[half], t[half])
        x = s[k] / s[after] * x + h / s[after] * inner
    return x


@full_variants
def test_steps_match_the_papers_formulas(bespoke: BespokeRungeKutta) -> None:
    """The method run on the transformed velocity of eq. 16 equals eq. 17 and 19-20."""
    parameters, field, x0 = perturbed(bespoke, 3), nonlinear_field(CondOT()), noise(4, 3)
    expected = _by_hand(bespoke, bespoke.transform(parameters, CondOT()), field, x0)
    assert relative_error(bespoke.sample(parameters, field, x0), expected) < 1e-13


@full_variants
def test_single_steps_compose_to_the_whole_solver(bespoke: BespokeRungeKutta) -> None:
    """Algorithm 2 transforms back and forth between steps and still equals Algorithm 4, even with sigma0."""
    parameters, field, x0, sigma0 = perturbed(bespoke, 3), nonlinear_field(CUT), noise(4, 3), 3.0
    nodes = bespoke.transform(parameters, CUT, sigma0)
    x = CUT.sigma(CUT.t_min) * x0
    for i in range(3):
        x = bespoke.step(nodes, i, x, field)
    assert relative_error(x, bespoke.sample(parameters, field, x0, sigma0)) < 1e-13


@full_variants
@on_schedulers
@pytest.mark.parametrize("sigma0", [0.5, 3.0])
def test_a_learned_transform_is_composed_with_the_preconditioning(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """One combined transform of the raw path equals the learned one applied to the preconditioned velocity."""
    parameters, field, x0 = perturbed(bespoke, 3), nonlinear_field(scheduler), noise(4, 3)
    inner = TransformedField(field, precondition(scheduler, sigma0))
    expected = inner.restore(bespoke.sample(parameters, inner, x0))
    assert relative_error(bespoke.sample(parameters, field, x0, sigma0), expected) < 1e-11


@full_variants
def test_every_change_of_scheduler_is_a_bespoke_transform(bespoke: BespokeRungeKutta) -> None:
    """BST Theorem 2.3: parameters in closed form sample FM-OT as if it were trained on the cosine path."""
    n = 4
    m = n * bespoke.stages
    change = SchedulerChange(CondOT(), Cosine())
    points = [change(k / m) for k in range(m + 1)]
    t, s, d_t, d_log_s = (torch.stack(column) for column in zip(*points, strict=True))
    parameters = bespoke.parameters_of(t, s, d_t[:-1], (d_log_s * s)[:-1], CondOT())
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    cosine = TransformedField(field, Cosine())
    expected = cosine.restore(identity(bespoke, n).sample(cosine, x0))
    assert relative_error(bespoke.sample(parameters, field, x0), expected) < 1e-12


def test_a_sample_keeps_the_shape_and_precision_of_its_noise() -> None:
    bespoke = BespokeRK2()
    sample = bespoke.sample(perturbed(bespoke, 2), nonlinear_field(CondOT()), noise(2, 3, 4, 4).float(), 2.0)
    assert (sample.shape, sample.dtype) == ((2, 3, 4, 4), torch.float32)


@all_variants
@pytest.mark.parametrize(("scheduler", "sigma0"), [(CondOT(), 1.0), (CUT, 3.0), (VP(), 1.0)], ids=["ot", "cut", "vp"])
def test_theta_is_differentiable_in_the_parameters(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """d(T, a, b)/d(parameters), which distillation by the chain rule needs, agrees with finite differences."""
    parameters = perturbed(bespoke, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: bespoke.to_ns(p, scheduler, sigma0).flat(), parameters, atol=1e-6)


# --- Consistency (Theorem 2.2) -----------------------------------------------------------------------------------


@functools.cache
def _exact_samples() -> tuple[Tensor, Tensor]:
    x0 = noise(8, 2)
    return x0, fine_rk4(mixture().field(CondOT()), x0, 0.0, 1.0, steps=800)


def _smooth(bespoke: BespokeRungeKutta, n: int, seed: int) -> Tensor:
    """Parameters of a random smooth transform with its true derivatives, at the nodes of n steps."""
    a, b, c, d = (
        0.8 * torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.4
    ).tolist()
    m = n * bespoke.stages
    r = torch.arange(m + 1, dtype=torch.float64) / m
    w = math.tau * r
    t = r + a * (1 - torch.cos(w)) / math.tau + b * torch.sin(2 * w) / (2 * math.tau)
    d_t = 1 + a * torch.sin(w) + b * torch.cos(2 * w)
    s = torch.exp(c * torch.sin(w) + d * r)
    d_s = s * (c * math.tau * torch.cos(w) + d)
    return bespoke.parameters_of(t, s, d_t[:-1], d_s[:-1], CondOT())


def _independent(bespoke: BespokeRungeKutta, n: int, seed: int) -> Tensor:
    """The identity's parameters, each perturbed independently at any number of steps."""
    return perturbed(bespoke, n, size=0.1, seed=seed)


def _order(
    bespoke: BespokeRungeKutta, parameters: Callable[[BespokeRungeKutta, int, int], Tensor], seeds: Iterable[int]
) -> float:
    """Minus the slope of log error against log steps; the error is the RMSE over samples and seeds."""
    x0, exact = _exact_samples()
    field, steps = mixture().field(CondOT()), (32, 128)
    errors = []
    for n in steps:
        samples = torch.stack([bespoke.sample(parameters(bespoke, n, seed), field, x0) for seed in seeds])
        errors.append(float((samples - exact).square().mean().sqrt()))
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
@full_variants
def test_a_smooth_transform_keeps_the_order_of_the_method(bespoke: BespokeRungeKutta, seed: int) -> None:
    """Theorem 2.2: with t_r, s_r and their true derivatives at the nodes, the orders are 1 and 2."""
    assert _order(bespoke, _smooth, [seed]) == pytest.approx(bespoke.base.order, abs=0.2)


@full_variants
def test_independent_parameters_do_not_converge(bespoke: BespokeRungeKutta) -> None:
    """Derivatives that belong to no function violate the theorem's premise."""
    assert _order(bespoke, _independent, range(16)) < 0.5


# --- Losses ------------------------------------------------------------------------------------------------------

LOSSES = {"rmse_bound": rmse_bound_loss, "lte": lte_loss}
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def linear_field(norm: float, scheduler: Scheduler | None = None) -> FunctionField:
    """u = A x + c(t) in three dimensions, with the spectral norm of A as its Lipschitz constant."""
    a = noise(3, 3, seed=5)
    a = norm * a / torch.linalg.matrix_norm(a, ord=2)
    return FunctionField(lambda x, t: x @ a.T + torch.cos(3 * t), scheduler or CondOT())


def global_error(
    bespoke: BespokeRungeKutta, parameters: Tensor, sigma0: float, field: VelocityField, path: DensePath, x0: Tensor
) -> Tensor:
    return rmse_loss(bespoke.sample(parameters, field, x0, sigma0), path.state(field.scheduler.t_max))


@full_variants
@pytest.mark.parametrize("scheduler", [CondOT(), CUT, Cosine()], ids=["ot", "cut", "cs"])
@pytest.mark.parametrize("sigma0", [1.0, 3.0])
@pytest.mark.parametrize("lipschitz", [2.0, 5.0])
def test_the_bound_holds_if_the_lipschitz_constant_is_large_enough(
    bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float, lipschitz: float
) -> None:
    """Eq. 25: sum M_i d_i >= ||x_n - x(1)|| for L_tau >= L_u = 2, for any parameters and all_variants sample."""
    field, x0 = linear_field(2.0, scheduler), noise(8, 3)
    path = dense_path(field, scheduler.sigma(scheduler.t_min) * x0, knots=33)
    for seed in range(5):
        parameters = perturbed(bespoke, 4, seed=seed)
        bound = rmse_bound_loss(bespoke, parameters, sigma0, field, path, lipschitz)
        assert bool((bound >= global_error(bespoke, parameters, sigma0, field, path, x0)).all())


def test_the_bound_may_fail_below_the_fields_lipschitz_constant() -> None:
    """L_tau = 1 is a heuristic: on x' = 3x all_variants error grows by more than its weight."""
    field, x0, bespoke = FunctionField(lambda x, t: 3 * x, CondOT()), noise(8, 3), BespokeRK1()
    path, start = dense_path(field, x0, knots=33), bespoke.start(identity(bespoke, 4), CondOT())
    bound = rmse_bound_loss(bespoke, start, 1.0, field, path)
    assert bool((bound < global_error(bespoke, start, 1.0, field, path, x0)).all())


def test_the_bound_is_tight_if_all_errors_point_the_same_way() -> None:
    """x' = 3x with Euler: each step loses x(t_i)(e^{3h} - 1 - 3h), and each later step multiplies that by 1 + 3h."""
    field, x0, bespoke = FunctionField(lambda x, t: 3 * x, CondOT()), noise(8, 3), BespokeRK1()
    path, start = dense_path(field, x0), bespoke.start(identity(bespoke, 4), CondOT())
    bound = rmse_bound_loss(bespoke, start, 1.0, field, path, lipschitz=3.0)
    torch.testing.assert_close(bound, global_error(bespoke, start, 1.0, field, path, x0), rtol=1e-9, atol=0)


@full_variants
def test_step_constants_match_the_papers_lemmas(bespoke: BespokeRungeKutta) -> None:
    """Lemmas D.2 and D.3 written out, with L = |s'|/s + t' L_tau."""
    n, l_tau = 3, 1.7
    nodes = bespoke.transform(perturbed(bespoke, n), CondOT())
    field_lipschitz = (nodes.d_log_s.abs() + nodes.d_t * l_tau).tolist()
    s, h = nodes.s.tolist(), 1 / n
    if bespoke.stages == 1:
        expected = [s[i] / s[i + 1] * (1 + h * field_lipschitz[i]) for i in range(n)]
    else:
        expected = [
            s[k] / s[k + 2] * (1 + h * field_lipschitz[k + 1] * (1 + h / 2 * field_lipschitz[k]))
            for k in range(0, 2 * n, 2)
        ]
    assert bespoke.step_lipschitz(nodes, l_tau).tolist() == pytest.approx(expected, rel=1e-13)


@both_losses
@pytest.mark.parametrize("steps", [1, 4])
def test_losses_weight_each_local_error_by_the_later_steps(loss: Callable[..., Tensor], steps: int) -> None:
    """d_i is measured at the end of step i, so the last weight is 1 and the constant of step 0 is never used."""
    bespoke, field, x0 = BespokeRK2(), nonlinear_field(CondOT()), noise(5, 3)
    path, parameters = dense_path(field, x0), perturbed(bespoke, steps)
    nodes = bespoke.transform(parameters, CondOT())
    factors = bespoke.step_lipschitz(nodes, 1.0).tolist() if loss is rmse_bound_loss else [1.0] * steps
    expected = torch.zeros(5, dtype=torch.float64)
    for i in range(steps):
        end = bespoke.step(nodes, i, path.state(nodes.t[2 * i]), field)
        error = per_sample_mse(end, path.state(nodes.t[2 * i + 2])).sqrt()
        expected += math.prod(factors[i + 1 :]) * error
    torch.testing.assert_close(loss(bespoke, parameters, 1.0, field, path), expected, rtol=1e-12, atol=0)


def test_rmse_loss_takes_the_root_per_sample() -> None:
    """BST eq. 6: errors of 1 and 1e-2 average to 0.505, while the root of their mean square would be 0.707."""
    x = torch.stack([torch.full((5,), 1.0), torch.full((5,), 1e-2)]).double()
    assert rmse_loss(x, torch.zeros_like(x)).tolist() == pytest.approx([1.0, 1e-2])


@both_losses
@all_variants
@pytest.mark.parametrize(("scheduler", "sigma0"), [(CondOT(), 1.0), (CUT, 3.0)], ids=["ot", "cut-sigma0=3"])
def test_loss_gradients_account_for_starts_that_move_along_the_path(
    loss: Callable[..., Tensor], bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """Finite differences of the true loss, whose step starts move with t_i, equal the gradient through x_aux."""
    field = mixture().field(scheduler)
    path = dense_path(field, scheduler.sigma(scheduler.t_min) * noise(3, 2))
    parameters = perturbed(bespoke, 2, size=0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(bespoke, p, sigma0, field, path), parameters, atol=1e-6, rtol=1e-4)


@all_variants
def test_the_gradient_of_rmse_loss_matches_finite_differences(bespoke: BespokeRungeKutta) -> None:
    """BST eq. 6, differentiated through the full_variants non-stationary form."""
    field, x0 = mixture().field(CondOT()), noise(3, 2)
    exact = fine_rk4(field, x0, 0.0, 1.0, steps=100)
    parameters = perturbed(bespoke, 2, size=0.1).requires_grad_()

    def loss(p: Tensor) -> Tensor:
        return rmse_loss(bespoke.to_ns(p, CondOT(), 1.0).sample(field, x0), exact)

    assert torch.autograd.gradcheck(loss, parameters, atol=1e-6)


def test_x_aux_moves_along_the_path_and_stops_every_other_gradient() -> None:
    """Eq. 27: the value is x(t), its derivative in t is the path's tangent, and no gradient flows into the path."""
    field = mixture().field(CondOT())
    path = dense_path(field, noise(3, 2), knots=513)
    weights = noise(3, 2, seed=2)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    state = path.state(0.4).requires_grad_()
    aux = x_aux(t, state, field)
    assert torch.equal(aux, state)
    by_t, by_state = torch.autograd.grad((weights * aux).sum(), (t, state), allow_unused=True)
    expected = central_difference(lambda at: (weights * path.state(at)).sum(), 0.4)
    assert float(by_t) == pytest.approx(float(expected), rel=1e-6)
    assert by_state is None


@both_losses
@pytest.mark.parametrize(
    ("bespoke", "with_graph", "expected"),
    [
        (BespokeRK1(), True, 4 + 3),
        (BespokeRK2(), True, 8 + 3),
        (BespokeRK2("scale"), True, 8),
        (BespokeRK2(), False, 8),
    ],
    ids=["RK1", "RK2", "times-not-learned", "value-only"],
)
def test_losses_evaluate_tangents_only_if_times_are_learned(
    loss: Callable[..., Tensor], bespoke: BespokeRungeKutta, with_graph: bool, expected: int
) -> None:
    """The documented cost: m evaluations for the steps, plus one at each inner time for x_aux."""
    field = CountingField(nonlinear_field(CondOT()))
    path = dense_path(field.field, noise(3, 2))
    loss(bespoke, perturbed(bespoke, 4).requires_grad_(with_graph), 1.0, field, path)
    assert field.nfe == expected


@both_losses
def test_an_exact_step_has_a_finite_gradient(loss: Callable[..., Tensor]) -> None:
    """On a constant velocity the identity's error is exactly 0, where a square root has an infinite slope."""
    field, bespoke = FunctionField(lambda x, t: torch.ones_like(x), CondOT()), BespokeRK1()
    parameters = bespoke.start(identity(bespoke, 4), CondOT()).requires_grad_()
    loss(bespoke, parameters, 1.0, field, dense_path(field, noise(3, 2))).sum().backward()
    assert parameters.grad is not None
    assert bool(torch.isfinite(parameters.grad).all())


@both_losses
def test_losses_are_per_sample_and_independent_of_the_batch(loss: Callable[..., Tensor]) -> None:
    """In float32, as for a network: row i of a batch is the float32 loss of sample i alone."""
    field, bespoke = nonlinear_field(CondOT()), BespokeRK2()
    path = dense_path(field, noise(5, 2, 3, 3))
    single = DensePath(path.times, path.states.float(), path.velocities.float())
    alone = DensePath(path.times[2:3], path.states[2:3].float(), path.velocities[2:3].float())
    parameters = perturbed(bespoke, 3)
    whole_batch = loss(bespoke, parameters, 1.0, field, single)
    assert (whole_batch.shape, whole_batch.dtype) == ((5,), torch.float32)
    torch.testing.assert_close(loss(bespoke, parameters, 1.0, field, alone), whole_batch[2:3], rtol=1e-4, atol=0)


def test_a_negative_lipschitz_constant_is_rejected() -> None:
    bespoke, field = BespokeRK1(), nonlinear_field(CondOT())
    with pytest.raises(
        ValueError, match=r"a Lipschitz constant must not be negative, got lipschitz=-1.0; the paper uses 1"
    ):
        rmse_bound_loss(bespoke, perturbed(bespoke, 2), 1.0, field, dense_path(field, noise(2, 2)), lipschitz=-1.0)


def test_a_path_that_ends_early_is_rejected() -> None:
    bespoke, field = BespokeRK1(), nonlinear_field(CondOT())
    path = dense_path(nonlinear_field(CondOT(t_max=0.9)), noise(2, 2))
    with pytest.raises(ValueError, match=r"x\(t\) queried at t=1, outside the path's times \[0, 0\.9\]"):
        lte_loss(bespoke, perturbed(bespoke, 2), 1.0, field, path)


def test_only_bespoke_families_have_single_steps() -> None:
    """Objectives check StepwiseFamily before they score a family's steps."""
    assert isinstance(BespokeRK1(), StepwiseFamily)
    assert not isinstance(BNS(), StepwiseFamily)


# --- Learning ----------------------------------------------------------------------------------------------------


@functools.cache
def _pairs(scheduler: Scheduler) -> tuple[Tensor, DensePath, Tensor, Tensor]:
    """(training noise, its paths, held-out noise, its samples) for a mixture's exact field."""
    field, x0 = mixture().field(scheduler), noise(160, 2)
    path = dense_path(field, scheduler.sigma(scheduler.t_min) * x0, knots=65)
    train = DensePath(path.times[:32], path.states[:32], path.velocities[:32])
    return x0[:32], train, x0[32:], path.states[32:, -1]


def _rmse(bespoke: BespokeRungeKutta, parameters: Tensor, sigma0: float, scheduler: Scheduler) -> float:
    _, _, x0, x1 = _pairs(scheduler)
    theta = bespoke.to_ns(parameters.detach(), scheduler, sigma0)
    return float(rmse_loss(theta.sample(mixture().field(scheduler), x0), x1).mean())


@pytest.mark.parametrize("name", ["rmse_bound", "lte", "rmse"])
@pytest.mark.parametrize(
    ("bespoke", "scheduler", "sigma0"),
    [(BespokeRK1(), CondOT(), 1.0), (BespokeRK2(), CondOT(), 1.0), (BespokeRK2(), CUT, 2.0)],
    ids=["RK1", "RK2", "RK2-cut-sigma0=2"],
)
def test_learning_with_each_loss_improves_held_out_samples(
    name: str, bespoke: BespokeRungeKutta, scheduler: Scheduler, sigma0: float
) -> None:
    """60 iterations of Adam from the identity with 4 steps reduce the RMSE on held-out noise by at least 15 %."""
    field = mixture().field(scheduler)
    x0, path, _, _ = _pairs(scheduler)
    start = bespoke.start(identity(bespoke, 4, sigma0=sigma0), scheduler)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        if name == "rmse":
            sample = bespoke.to_ns(parameters, scheduler, sigma0).sample(field, x0)
            value = rmse_loss(sample, path.states[:, -1])
        else:
            value = LOSSES[name](bespoke, parameters, sigma0, field, path)
        value.mean().backward()
        optimizer.step()
    assert _rmse(bespoke, parameters, sigma0, scheduler) < 0.85 * _rmse(bespoke, start, sigma0, scheduler)


@all_variants
def test_distillation_by_the_chain_rule_moves_bespoke_parameters(bespoke: BespokeRungeKutta) -> None:
    """A method works as for BNS: gradients in (T, a, b) become gradients in 4n - 1 or 8n - 1 parameters."""
    field = mixture().field(CondOT())
    x0, path, _, _ = _pairs(CondOT())

    def objective(query: GradientQuery) -> LossAndGradient:
        assert isinstance(query.at, NSSolver)
        flat = query.at.flat().requires_grad_()
        sample = NSSolver.from_flat(flat).sample(field, x0[query.indices])
        loss = rmse_loss(sample, path.states[query.indices, -1]).mean()
        return LossAndGradient(float(loss.detach()), torch.autograd.grad(loss, flat)[0])

    start = bespoke.start(identity(bespoke, 4), CondOT())
    settings = Adam(learning_rate=1e-2, iterations=40, batch_size=32, training_pairs=32)
    state = drive(settings.iterate(settings.begin(start), 40, Problem(bespoke, CondOT())), objective)
    learned = torch.tensor(state.parameters, dtype=torch.float64)
    assert len(learned) == len(start)
    assert _rmse(bespoke, learned, 1.0, CondOT()) < 0.9 * _rmse(bespoke, start, 1.0, CondOT())


# --- Rejected input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bespoke", "other", "message"),
    [
        (BespokeRK1(), Midpoint(), r"BST-RK1 can only equal Euler, not Midpoint; start it from euler, or learn 'bns'"),
        (BespokeRK2(), Heun(), r"BST-RK2 can only equal Midpoint, not Heun; start it from midpoint, or learn 'bns'"),
        (BespokeRK2("time"), Euler(), r"BST-RK2 time-only can only equal Midpoint, not Euler; start it from midpoint"),
    ],
    ids=["RK1", "RK2", "time-only"],
)
def test_a_start_from_another_method_is_rejected_with_a_remedy(
    bespoke: BespokeRungeKutta, other: Euler | Midpoint | Heun, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bespoke.start(GridSolver(other, 4, UNIFORM), CondOT())


def test_a_scale_only_solver_on_a_non_uniform_grid_is_rejected_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"start it from the uniform grid, or learn 'both' or 'time'"):
        BespokeRK2("scale").start(GridSolver(Midpoint(), 4, WARPED), CondOT())


def test_scale_only_accepts_a_warped_grid_that_is_uniform() -> None:
    """The check looks at the times, not at the kind of the grid."""
    family = BespokeRK2("scale")
    assert len(family.start(GridSolver(Midpoint(), 4, Grid("warped", p=1.0, q=1.0)), CondOT())) == 8


def test_a_time_only_solver_with_a_scale_is_rejected() -> None:
    nodes = BespokeRK1().transform(perturbed(BespokeRK1(), 3), CondOT())
    with pytest.raises(ValueError, match="BST-RK1 time-only keeps the scale at s = 1; learn 'both' or 'scale'"):
        BespokeRK1("time").parameters_of(nodes.t, nodes.s, nodes.d_t, nodes.d_log_s * nodes.s[:-1], CondOT())


@pytest.mark.parametrize("change", ["times-fall", "time-backwards", "scale-of-zero", "start-scaled", "ends-early"])
def test_nodes_that_violate_the_transform_constraints_are_rejected(change: str) -> None:
    """Boundary conditions and signs of BST eq. 18 and 21."""
    t, s = torch.linspace(0, 1, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    d_t, d_s = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    match change:
        case "times-fall":
            t[1] = 0.8
        case "time-backwards":
            d_t[1] = -1
        case "scale-of-zero":
            s[2] = 0
        case "start-scaled":
            s[0] = 2
        case "ends-early":
            t[3] = 0.9
    with pytest.raises(ValueError, match=r"a scale-time transform on \[0, 1\] has times that rise from its first to"):
        BespokeRK1().parameters_of(t, s, d_t, d_s, CondOT())


def test_a_transform_at_the_wrong_nodes_is_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"for BST-RK2 has t and s of shape .* multiple of 2; got \(4,\), \(4,\), \(3,\)"
    ):
        BespokeRK2().parameters_of(*(torch.ones(k, dtype=torch.float64) for k in (4, 4, 3, 3)), CondOT())


def test_an_unknown_learn_option_is_rejected() -> None:
    with pytest.raises(ValueError, match="BST-RK1 can learn both, time, scale, got 'times'"):
        BespokeRK1("times")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bespoke", "length", "counts"),
    [(BespokeRK1(), 20, "3, 7, 11"), (BespokeRK2("time"), 5, "3, 7, 11"), (BespokeRK2("scale"), 6, "4, 8, 12")],
    ids=lambda value: value.label if isinstance(value, BespokeRungeKutta) else "",
)
def test_a_parameter_vector_of_invalid_length_is_rejected(bespoke: BespokeRungeKutta, length: int, counts: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{length} numbers are not a parameter vector of {bespoke.label}: .* have {counts},"
    ):
        bespoke.to_ns(torch.zeros(length, dtype=torch.float64), CondOT(), 1.0)
