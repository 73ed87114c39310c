"""Restricted learned families: what each may learn and what it must keep; and BNS before its reduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import (
    affordable_nfe,
    fine_rk4,
    fixed_families,
    learnable_families,
    mixture,
    noise,
    nonlinear_field,
    relative_error,
)
from torch import Tensor

from solvers.families._learned import rising_times
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family, GridSolver, LearnableFamily
from solvers.families.bns import BNS
from solvers.families.bns_overparametrised import OverparametrisedBNS, reduce_update_rules
from solvers.families.ddim import DDIM
from solvers.families.dpmpp_2m import DPMpp2M
from solvers.families.euler import Euler
from solvers.families.heun import Heun
from solvers.families.ld3 import LD3
from solvers.families.midpoint import Midpoint
from solvers.families.neural_solver import NeuralSolver
from solvers.families.rk4 import RK4
from solvers.field import FunctionField
from solvers.grids import UNIFORM, Grid
from solvers.losses import psnr_loss
from solvers.ns import NSSolver
from solvers.prediction import PredictionField
from solvers.schedulers import VP, CondOT, Cosine, Scheduler, as_time
from solvers.to_ns import to_ns

WARPED = Grid("warped", p=1.6, q=1.2)
AB3_GRID = LD3("adams_bashforth", {"steps_back": 3}, decoupled=True)

#: Each family under test with a solver that it can start from.
STARTS: list[tuple[LearnableFamily, Family]] = [
    (LD3(), DPMpp2M()),
    (LD3(decoupled=True), DPMpp2M()),
    (LD3("midpoint", decoupled=True), Midpoint()),
    (AB3_GRID, AdamsBashforth(3)),
    (NeuralSolver(), Euler()),
    (NeuralSolver(), AdamsBashforth(4)),
    (NeuralSolver(), Midpoint()),
    (OverparametrisedBNS(), DDIM()),
    (OverparametrisedBNS(), AdamsBashforth(2)),
]
each_start = pytest.mark.parametrize(
    ("learned", "fixed"), STARTS, ids=[f"{learned.label} from {fixed.label}" for learned, fixed in STARTS]
)
one_of_each = pytest.mark.parametrize(
    ("learned", "fixed"),
    [STARTS[i] for i in (0, 1, 5, 8)],
    ids=["LD3", "LD3 decoupled", "NeuralSolver", "BNS (c, d)"],
)
domains = pytest.mark.parametrize("scheduler", [CondOT(), VP(), CondOT(t_min=0.2)], ids=["cond_ot", "vp", "cut"])
scaled = pytest.mark.parametrize("sigma0", [1.0, 2.0])


def generic_parameters(
    learned: LearnableFamily, fixed: Family, nfe: int, sigma0: float = 1.0, scheduler: Scheduler | None = None
) -> Tensor:
    """Generic parameters: those of a start, perturbed."""
    start = learned.start(GridSolver(fixed, nfe, UNIFORM, sigma0), scheduler or CondOT())
    return start + 0.02 * noise(len(start), seed=7)


def adam_run(
    learned: LearnableFamily, solver: GridSolver, iterations: int, learning_rate: float = 5e-3
) -> Iterator[Tensor]:
    """The parameters of a short distillation on the mixture, from the start on, after each iteration."""
    field, scheduler = mixture().field(CondOT()), CondOT()
    x0 = noise(48, 2, seed=3)
    exact = fine_rk4(field, x0, 0.0, 1.0, steps=50)
    parameters = learned.start(solver, scheduler).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=learning_rate)
    yield parameters.detach().clone()
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - iteration / iterations)
        theta = learned.to_ns(parameters, scheduler, solver.sigma0)
        optimizer.zero_grad()
        psnr_loss(theta.sample(field, x0), exact).mean().backward()
        optimizer.step()
        with torch.no_grad():
            parameters.copy_(learned.project(parameters.detach(), scheduler, solver.sigma0))
        yield parameters.detach().clone()


# --- Properties of every family ------------------------------------------------------------------------------------


@each_start
@domains
@scaled
@pytest.mark.parametrize("grid", [UNIFORM, WARPED, Grid("log_snr")], ids=lambda grid: grid.kind)
def test_the_start_equals_the_given_solver(
    learned: LearnableFamily, fixed: Family, scheduler: Scheduler, sigma0: float, grid: Grid
) -> None:
    """to_ns(start(solver)) gives the same samples as solver, to rounding, on every kind of grid, path and sigma0."""
    solver = GridSolver(fixed, affordable_nfe(fixed, 4), grid, sigma0)
    field, x0 = nonlinear_field(scheduler), noise(4, 3)
    theta = learned.to_ns(learned.start(solver, scheduler), scheduler, sigma0)
    assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < 1e-11


@each_start
@domains
@scaled
def test_projection_does_not_change_a_start(
    learned: LearnableFamily, fixed: Family, scheduler: Scheduler, sigma0: float
) -> None:
    """The projection is the identity inside the domain, so it cannot degrade learned parameters."""
    start = learned.start(GridSolver(fixed, affordable_nfe(fixed, 4), WARPED, sigma0), scheduler)
    assert torch.equal(learned.project(start, scheduler, sigma0), start)


@one_of_each
@pytest.mark.parametrize("scheduler", [CondOT(), Cosine(), VP()], ids=lambda scheduler: scheduler.name)
@scaled
def test_the_map_to_theta_is_differentiable(
    learned: LearnableFamily, fixed: Family, scheduler: Scheduler, sigma0: float
) -> None:
    """Every entry of d theta / d parameters, including the folded sigma0, agrees with finite differences."""
    parameters = generic_parameters(learned, fixed, 3, sigma0, scheduler).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: learned.to_ns(p, scheduler, sigma0).flat(), parameters, atol=1e-6)


@each_start
@domains
@scaled
def test_the_projected_solver_is_usable_after_any_optimiser_step(
    learned: LearnableFamily, fixed: Family, scheduler: Scheduler, sigma0: float
) -> None:
    """Parameters far away still give finite coefficients and times in [0, 1] at which the velocity is finite."""
    start = learned.start(GridSolver(fixed, affordable_nfe(fixed, 4), UNIFORM, sigma0), scheduler)
    for seed in range(4):
        wild = start + 30 * noise(len(start), seed=seed)
        theta = learned.to_ns(learned.project(wild, scheduler, sigma0), scheduler, sigma0)
        assert bool(torch.isfinite(theta.flat()).all())
        for t in theta.times:
            scheduler.check_velocity_time(t)


@each_start
@pytest.mark.parametrize("scheduler", [CondOT(), VP()], ids=["cond_ot", "vp"])
def test_projection_is_idempotent(learned: LearnableFamily, fixed: Family, scheduler: Scheduler) -> None:
    """Otherwise parameters would drift from iteration to iteration without any gradient."""
    start = learned.start(GridSolver(fixed, affordable_nfe(fixed, 4), UNIFORM), scheduler)
    once = learned.project(start + 30 * noise(len(start)), scheduler, 1.0)
    torch.testing.assert_close(learned.project(once, scheduler, 1.0), once, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scheduler", [VP()], ids=["vp"])
@pytest.mark.parametrize(
    ("learned", "fixed"), [(LD3(), DPMpp2M()), (NeuralSolver(), Midpoint())], ids=["LD3", "Neural"]
)
def test_the_last_query_keeps_away_from_an_infinite_velocity(
    learned: LearnableFamily, fixed: Family, scheduler: Scheduler
) -> None:
    """A last step of almost zero length would query t = 1 - 1e-9, so it is kept longer than BNS's margin of 1e-4."""
    parameters = learned.start(GridSolver(fixed, 4, UNIFORM), scheduler)
    parameters[:4] = torch.tensor([0.0, 0.0, 0.0, -20.0], dtype=torch.float64)
    theta = learned.to_ns(learned.project(parameters, scheduler, 1.0), scheduler, 1.0)
    assert 1 - 1e-3 < float(theta.times[-1]) < 1 - 1e-4


@pytest.mark.parametrize(
    ("learned", "fixed", "nfe", "count"),
    [
        (LD3(), DPMpp2M(), 6, 6),
        (LD3(decoupled=True), DPMpp2M(), 6, 6 + 5),
        (LD3("midpoint"), Midpoint(), 6, 3),
        (LD3("midpoint", decoupled=True), Midpoint(), 6, 3 + 5),
        (NeuralSolver(), Euler(), 10, 10 + 45),
        (OverparametrisedBNS(), Euler(), 8, 7 + 36 + 36),
        (LD3(), DPMpp2M(), 1, 1),
        (LD3(decoupled=True), DPMpp2M(), 1, 1),
        (NeuralSolver(), Euler(), 1, 1),
        (OverparametrisedBNS(), Euler(), 1, 2),
    ],
    ids=lambda value: value.label if hasattr(value, "label") else str(value),
)
def test_the_parameter_count_matches_the_restriction_and_determines_nfe(
    learned: LearnableFamily, fixed: Family, nfe: int, count: int
) -> None:
    """LD3: one per step (plus one per query after the first); NeuralSolver: n(n+1)/2; BNS (c, d): n^2 + 2n - 1."""
    parameters = learned.start(GridSolver(fixed, nfe, UNIFORM), CondOT())
    assert (len(parameters), learned.to_ns(parameters, CondOT(), 1.0).nfe) == (count, nfe)


@pytest.mark.parametrize(
    ("learned", "count", "match"),
    [
        (
            LD3("midpoint", decoupled=True),
            3,
            r"3 numbers are not a parameter vector of LD3 Midpoint decoupled: it has one parameter per grid step",
        ),
        (LD3(), 0, r"0 numbers are not a parameter vector of LD3 DPM\+\+\(2M\): it has one parameter per grid step$"),
        (
            NeuralSolver(),
            7,
            r"7 numbers are not a parameter vector of NeuralSolver: n evaluations have n\(n\+1\)/2 parameters",
        ),
        (
            OverparametrisedBNS(),
            8,
            r"8 numbers are not a parameter vector of BNS \(c, d\): n evaluations have n\^2 \+ 2n - 1 parameters",
        ),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_a_parameter_vector_of_invalid_length_is_rejected(learned: LearnableFamily, count: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        learned.to_ns(torch.zeros(count, dtype=torch.float64), CondOT(), 1.0)


@pytest.mark.parametrize("learned", [LD3(), AB3_GRID, NeuralSolver()], ids=lambda learned: learned.label)
def test_a_family_starts_only_from_the_families_it_declares(learned: LearnableFamily) -> None:
    """``starts_from`` predicts for every fixed family whether ``start`` succeeds."""
    for fixed in fixed_families():
        solver = GridSolver(fixed, affordable_nfe(fixed, 4), UNIFORM)
        if learned.starts_from(fixed):
            learned.start(solver, CondOT())
        else:
            with pytest.raises(ValueError, match=r"cannot (start from|equal) .*; start from "):
                learned.start(solver, CondOT())


@pytest.mark.parametrize(
    ("learned", "fixed", "learning_rate", "gain_db"),
    [
        (LD3(), DPMpp2M(), 2e-2, 5),
        (LD3(decoupled=True), DPMpp2M(), 2e-2, 5),
        (NeuralSolver(), AdamsBashforth(2), 5e-3, 7),
        (OverparametrisedBNS(), AdamsBashforth(2), 1e-3, 7),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_distillation_improves_on_the_start(
    learned: LearnableFamily, fixed: Family, learning_rate: float, gain_db: float
) -> None:
    """Adam on 48 pairs of the mixture at NFE 6, scored in dB on 256 held-out pairs."""
    field, x0 = mixture().field(CondOT()), noise(256, 2, seed=4)
    exact = fine_rk4(field, x0, 0.0, 1.0, steps=50)
    start, *_, last = adam_run(learned, GridSolver(fixed, 6, UNIFORM), 80, learning_rate)
    before, after = (
        float(psnr_loss(learned.to_ns(p, CondOT(), 1.0).sample(field, x0), exact).mean()) for p in (start, last)
    )
    assert 10 * (before - after) / torch.log(torch.tensor(10.0)) > gain_db


VARIANTS = [
    LD3(decoupled=True),
    LD3("midpoint", decoupled=True),
    BNS(beginning="time"),
    BNS(beginning="free"),
]


@pytest.mark.parametrize("nfe", [1, 2, 4, 6])
@pytest.mark.parametrize("learnable", [*learnable_families(), *VARIANTS])
def test_the_degrees_of_freedom_are_the_rank_of_the_map_to_theta(learnable: LearnableFamily, nfe: int) -> None:
    """At parameters near a start; 0 if a family has a single solver, as LD3 and NeuralSolver at one evaluation."""
    starts = [family for family in fixed_families() if learnable.starts_from(family)]
    usable = [family for family in starts if affordable_nfe(family, nfe) == nfe]
    if not usable:
        pytest.skip("no solver of so few evaluations to start from")
    parameters = learnable.start(GridSolver(usable[0], nfe, UNIFORM), CondOT())
    nudged = learnable.project(parameters + 1e-2 * noise(len(parameters)), CondOT(), 1.0)
    jacobian = torch.autograd.functional.jacobian(lambda p: learnable.to_ns(p, CondOT(), 1.0).flat(), nudged)
    assert learnable.freedom(nfe) == int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


# --- LD3 -----------------------------------------------------------------------------------------------------------


class _OnExplicitTimes:
    """A fixed family on explicit times, as a reference for LD3 that shares no code with it."""

    def __init__(self, family: Family, nfe: int, times: Tensor):
        self.family, self.nfe, self.times = family, nfe, times

    def sample(self, velocity: Any, x0: Tensor) -> Tensor:
        return self.family.integrate(velocity, velocity.scheduler.sigma(self.times[0]) * x0, self.times)


def test_ld3_step_sizes_are_a_softmax_of_the_parameters() -> None:
    """Logits log 1, log 2, log 5 split the unit interval at 1/8 and 3/8; a common shift changes nothing."""
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()
    for shift in (0.0, 3.0):
        theta = LD3("euler").to_ns(logits + shift, CondOT(), 1.0)
        assert theta.times.tolist() == pytest.approx([0, 1 / 8, 3 / 8])


@pytest.mark.parametrize("inner", [("dpmpp_2m", DPMpp2M()), ("midpoint", Midpoint())], ids=lambda inner: inner[0])
def test_ld3_remains_its_inner_solver_during_training(inner: tuple[str, Family]) -> None:
    """Only the grid is learned: at every iterate theta is the inner solver on the softmax's times."""
    name, fixed = inner
    for parameters in adam_run(LD3(name), GridSolver(fixed, 6, UNIFORM), 10):
        steps = parameters.exp() / parameters.exp().sum()
        times = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        times[-1] = 1.0
        expected = to_ns(_OnExplicitTimes(fixed, 6, times), CondOT())
        torch.testing.assert_close(LD3(name).to_ns(parameters, CondOT(), 1.0).flat(), expected.flat())


@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("fixed", fixed_families(), ids=lambda fixed: fixed.label)
def test_ld3_can_learn_the_grid_of_every_fixed_family(fixed: Family, decoupled: bool) -> None:
    """Any module name and options work, for any cost per step (EDM's Heun saves one evaluation on the last step)."""
    options = {option.name: getattr(fixed, option.name) for option in dataclasses.fields(fixed)}
    learned = LD3(type(fixed).__module__.rpartition(".")[2], options, decoupled)
    solver = GridSolver(fixed, affordable_nfe(fixed, 5), WARPED)
    theta = learned.to_ns(learned.start(solver, CondOT()), CondOT(), 1.0)
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < 1e-10


def test_decoupled_ld3_moves_the_query_and_keeps_the_coefficients() -> None:
    """Two Euler steps by hand: x2 = x1 + h u(x1, t1 + delta), with h and t1 from the solver's own grid."""
    field, x0 = nonlinear_field(CondOT()), noise(3, 2)
    parameters = torch.tensor([1 / 4, 3 / 4, 0.0], dtype=torch.float64)
    parameters[:2] = parameters[:2].log()
    parameters[2] = 0.1
    x1 = x0 + field(x0, as_time(0.0)) / 4
    x2 = x1 + field(x1, as_time(0.35)) * 3 / 4
    theta = LD3("euler", decoupled=True).to_ns(parameters, CondOT(), 1.0)
    assert relative_error(theta.sample(field, x0), x2) < 1e-14


def test_ld3_that_holds_the_data_equals_the_published_code() -> None:
    """samplers/dpm_solverpp.py with ``timesteps2``: the data prediction is converted at the network's time t2, and the
    step of DPM-Solver++(2M) is taken at t1."""
    path = VP(t_max=0.999)
    network, x0 = mixture().network("epsilon", path), noise(6, 2)
    parameters = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.02, -0.03, 0.01], dtype=torch.float64)
    times = rising_times(parameters[:4], path)
    queried = times[:-1] + torch.cat([torch.zeros(1, dtype=torch.float64), parameters[4:]])
    x, data = path.sigma(0.0) * x0, list[torch.Tensor]()
    for k in range(4):
        at = path(queried[k])
        data.append((x - at.sigma * network(x, queried[k])) / at.alpha)
        start, end = path(times[k]), path(times[k + 1])
        h = path.lambda_(times[k + 1]) - path.lambda_(times[k])
        used = data[-1]
        if 0 < k < 3:  # fewer than 10 steps: the last has first order
            r = (path.lambda_(times[k]) - path.lambda_(times[k - 1])) / h
            used = data[-1] + (data[-1] - data[-2]) / (2 * r)
        x = end.sigma / start.sigma * x - end.alpha * torch.expm1(-h) * used
    field = PredictionField(network, "epsilon", path)
    theta = LD3(decoupled=True, holds="sample").to_ns(parameters, path, 1.0)
    assert relative_error(theta.sample(field, x0), x) < 1e-12
    other = LD3(decoupled=True).to_ns(parameters, path, 1.0)
    assert relative_error(other.sample(field, x0), x) > 1e-4


def test_ld3_that_holds_the_noise_equals_ddim_with_the_noise_of_another_time() -> None:
    """The published code's noise prediction is network(x, t2), used at t1 without conversion."""
    path = VP(t_max=0.999)
    network, x0 = mixture().network("epsilon", path), noise(6, 2)
    parameters = torch.tensor([0.1, -0.2, 0.0, 0.02, -0.03], dtype=torch.float64)
    times = rising_times(parameters[:3], path)
    queried = times[:-1] + torch.cat([torch.zeros(1, dtype=torch.float64), parameters[3:]])
    x = path.sigma(0.0) * x0
    for k in range(3):
        start, end = path(times[k]), path(times[k + 1])
        epsilon = network(x, queried[k])
        x = end.alpha * (x - start.sigma * epsilon) / start.alpha + end.sigma * epsilon
    theta = LD3("ddim", decoupled=True, holds="epsilon").to_ns(parameters, path, 1.0)
    assert relative_error(theta.sample(PredictionField(network, "epsilon", path), x0), x) < 1e-12


def test_decoupled_ld3_learns_separate_network_times() -> None:
    """During a run the weights stay those of the coupled solver, while the network's times leave the solver's times."""
    coupled, decoupled = LD3("adams_bashforth"), LD3("adams_bashforth", decoupled=True)
    *_, last = adam_run(decoupled, GridSolver(AdamsBashforth(2), 6, UNIFORM), 10)
    theta, coupled_theta = decoupled.to_ns(last, CondOT(), 1.0), coupled.to_ns(last[:6], CondOT(), 1.0)
    torch.testing.assert_close(theta.b, coupled_theta.b, rtol=0, atol=0)
    assert float(theta.times[0]) == 0.0
    assert float((theta.times - coupled_theta.times)[1:].abs().min()) > 1e-3


def test_a_network_time_stays_within_half_the_smallest_step() -> None:
    """The published window, in which queries cannot overtake their neighbours."""
    learned = LD3(decoupled=True)
    parameters = learned.start(GridSolver(DPMpp2M(), 4, UNIFORM), CondOT())
    parameters[4:] = torch.tensor([9.0, -9.0, 0.05], dtype=torch.float64)
    times = learned.to_ns(learned.project(parameters, CondOT(), 1.0), CondOT(), 1.0).times
    assert times.tolist() == pytest.approx([0.0, 0.25 + 0.125, 0.5 - 0.125, 0.75 + 0.05])


def test_ld3_rejects_a_start_of_another_family() -> None:
    with pytest.raises(
        ValueError,
        match=r"LD3 DPM\+\+\(2M\) learns the times of DPM\+\+\(2M\) and cannot start from Euler; "
        r"start from 'dpmpp_2m' with the options \{\}, on any grid, or name the start's family as 'inner'",
    ):
        LD3().start(GridSolver(Euler(), 4, UNIFORM), CondOT())


def test_ld3_rejects_a_start_with_other_options_of_its_inner_family() -> None:
    """AB3's grid cannot be learned from an AB2 solver, although both are adams_bashforth."""
    with pytest.raises(ValueError, match=r"cannot start from AB2; start from 'adams_bashforth' with .*'steps_back': 3"):
        AB3_GRID.start(GridSolver(AdamsBashforth(2), 4, UNIFORM), CondOT())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inner": "dpm"}, "there is no solver family 'dpm'"),
        ({"inner": "bns"}, "family 'bns' is learned itself and cannot be wrapped"),
        ({"inner": "euler", "inner_options": {"order": 2}}, "family 'euler' refuses the options"),
        ({"decoupled": "no"}, "decoupled must be true or false, got 'no'"),
    ],
    ids=["unknown", "learned", "options", "decoupled"],
)
def test_options_that_ld3_cannot_use_are_rejected_at_construction(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LD3(**options)


class _Bounds(Grid):
    """A grid of given times that ignores the domain."""

    def times(self, steps: int, scheduler: Scheduler) -> Tensor:
        return torch.tensor([0.0, 0.5, 0.5, 0.9][: steps + 1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (
            1,
            "learns times between the ends of the domain, 0 and 1, but these run from 0 to 0.5; start from a grid over",
        ),
        (2, "but these run from 0 to 0.5"),
    ],
)
def test_a_grid_that_stops_short_of_the_domain_is_rejected(steps: int, match: str) -> None:
    """The ends are not learned, so a start with other ends could not be reproduced."""
    with pytest.raises(ValueError, match=match):
        LD3("euler").start(GridSolver(Euler(), steps, _Bounds()), CondOT())


def test_a_grid_that_does_not_rise_is_rejected() -> None:
    """A step of zero length has no logarithm."""
    with pytest.raises(ValueError, match=r"times that rise strictly, but t=0\.5 is followed by t=0\.5; start from"):
        LD3("euler").start(GridSolver(Euler(), 3, _Bounds()), CondOT(t_max=0.9))


# --- NeuralSolver --------------------------------------------------------------------------------------------------


def _keeps_its_restriction(theta: NSSolver) -> bool:
    """Whether times rise, a is constant, and row k of b sums to t_k - t_0 (on CondOT, where t_n = 1)."""
    times = torch.cat([theta.times, torch.ones(1, dtype=torch.float64)])
    sums = theta.b.sum(dim=1)
    return (
        all(t < after for t, after in pairwise(times.tolist()))
        and bool((theta.a == theta.a[0]).all())
        and float((sums - times).abs().max()) < 1e-14
    )


def test_neural_solver_keeps_its_restriction_during_training() -> None:
    """At every iterate times rise, a = 1 and each step's weights sum to its length, although all parameters change."""
    run = list(adam_run(NeuralSolver(), GridSolver(AdamsBashforth(2), 6, UNIFORM), 20))
    assert all(_keeps_its_restriction(NeuralSolver().to_ns(parameters, CondOT(), 1.0)) for parameters in run)
    assert bool((run[-1] != run[0]).all())


def test_bns_leaves_the_restriction_of_neural_solver() -> None:
    """With all of theta free, the same run violates the restriction at once, so it is a real one."""
    *_, last = adam_run(BNS(), GridSolver(AdamsBashforth(2), 6, UNIFORM), 2)
    assert not _keeps_its_restriction(BNS().to_ns(last, CondOT(), 1.0))


def test_neural_solver_integrates_a_constant_velocity_exactly() -> None:
    """The constraint on the sums of the weights guarantees this for any parameters."""
    field, x0 = FunctionField(lambda x, t: torch.full_like(x, 3.0), CondOT()), noise(4, 2)
    theta = NeuralSolver().to_ns(noise(15, seed=2), CondOT(), 1.0)
    assert relative_error(theta.sample(field, x0), x0 + 3) < 1e-13


def test_neural_solver_follows_its_formula() -> None:
    """x_{i+1} = x_i + (t_{i+1} - t_i) sum_j c_ij u_j written out for n = 2: p = (l_0, l_1, c_10), c_11 = 1 - c_10."""
    field, x0 = nonlinear_field(CondOT()), noise(3, 2)
    parameters = torch.tensor([0.0, 0.0, -0.3], dtype=torch.float64)
    u0 = field(x0, as_time(0.0))
    x1 = x0 + 0.5 * u0
    expected = x1 + 0.5 * (-0.3 * u0 + 1.3 * field(x1, as_time(0.5)))
    assert relative_error(NeuralSolver().to_ns(parameters, CondOT(), 1.0).sample(field, x0), expected) < 1e-14


def test_neural_solver_represents_adams_bashforth_by_its_weights() -> None:
    """AB2 on a uniform grid is (3, -1)/2: c_{i,i-1} = -1/2, and no older velocity is used."""
    parameters = NeuralSolver().start(GridSolver(AdamsBashforth(2), 4, UNIFORM), CondOT())
    assert parameters.tolist() == pytest.approx([0, 0, 0, 0, -0.5, 0, -0.5, 0, 0, -0.5])


@pytest.mark.parametrize("fixed", [RK4(), Heun(), DDIM()], ids=lambda fixed: fixed.label)
def test_neural_solver_rejects_a_start_outside_its_restriction(fixed: Family) -> None:
    """An approximation would start from a different solver, which would be another experiment."""
    with pytest.raises(
        ValueError,
        match=rf"NeuralSolver cannot equal {fixed.label}: its times rise strictly.*; "
        r"start from euler or adams_bashforth or midpoint",
    ):
        NeuralSolver().start(GridSolver(fixed, 4, UNIFORM), CondOT())


# --- BNS before its reduction --------------------------------------------------------------------------------------


def _update_rules(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times and weights (c, d) of a solver that uses all previous states and velocities."""
    c, d = (0.6 * noise(n, n, seed=seed).tril() for seed in (0, 1))
    return torch.linspace(0.0, 0.9, n, dtype=torch.float64), c, d


def _over_all_states(field: FunctionField, x0: Tensor, times: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """BNS eq. 10 itself: x_{i+1} = X_i c_i + U_i d_i, keeping all states and velocities."""
    states, velocities = [x0], []
    for i, t in enumerate(times):
        velocities.append(field(states[i], t))
        past = zip(c[i], states, d[i], velocities, strict=False)
        states.append(sum((cj * x + dj * u for cj, x, dj, u in past), torch.zeros_like(x0)))
    return states[-1]


def _printed_eq_32(c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 32 as printed, in the paper's indices: (a_k, b_k) give x_{k+1}, and (c_k)_j multiplies a_j."""
    n = len(c)
    a, b = torch.zeros(n, dtype=c.dtype), torch.zeros(n, n, dtype=c.dtype)
    for k in range(n):
        a[k] = c[k, 0] + sum(c[k, j] * a[j] for j in range(k))
        b[k] = d[k]
        for j in range(k):
            b[k, j] += sum(c[k, m + 1] * b[m, j] for m in range(j, k))
    return torch.cat([torch.ones(1, dtype=a.dtype), a]), torch.cat([torch.zeros(1, n, dtype=b.dtype), b])


def test_the_corrected_reduction_equals_the_solver_over_all_states() -> None:
    """Proposition 3.1 on a nonlinear field: (c, d) over all states and the reduced (a, b) give the same sample."""
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    times, c, d = _update_rules(5)
    a, b = reduce_update_rules(c, d, torch.ones(1, dtype=torch.float64))
    sample = NSSolver(times, a, b).sample(field, x0)
    assert relative_error(sample, _over_all_states(field, x0, times, c, d)) < 1e-13


def test_the_printed_reduction_is_a_different_solver() -> None:
    """Eq. 32 as printed pairs the weight of x_j with that of x_{j+1}: its sample is far off, but its b is right."""
    field, x0 = nonlinear_field(CondOT()), noise(4, 3)
    times, c, d = _update_rules(5)
    a, b = _printed_eq_32(c, d)
    sample = NSSolver(times, a, b).sample(field, x0)
    assert relative_error(sample, _over_all_states(field, x0, times, c, d)) > 0.1
    torch.testing.assert_close(b, reduce_update_rules(c, d, torch.ones(1, dtype=torch.float64))[1])


def test_the_reduction_scales_a_with_the_first_state() -> None:
    """On paths that start from sigma(t_min) x0 with sigma < 1, a is scaled by sigma and b is unchanged."""
    _, c, d = _update_rules(4)
    unit, half = (reduce_update_rules(c, d, torch.tensor([scale], dtype=torch.float64)) for scale in (1.0, 0.5))
    torch.testing.assert_close(half[0], 0.5 * unit[0])
    torch.testing.assert_close(half[1], unit[1])


def test_a_start_may_query_the_same_time_twice() -> None:
    """RK4's middle stages share a time: times are free, as in BNS, so its weights are represented exactly."""
    field, x0, solver = nonlinear_field(CondOT()), noise(4, 3), GridSolver(RK4(), 8, WARPED)
    learned = OverparametrisedBNS()
    theta = learned.to_ns(learned.start(solver, CondOT()), CondOT(), 1.0)
    assert relative_error(theta.sample(field, x0), solver.sample(field, x0)) < 1e-11


@pytest.mark.parametrize(
    ("learned", "fixed"), [(LD3("heun"), Heun()), (OverparametrisedBNS(), RK4())], ids=["LD3", "BNS (c, d)"]
)
def test_a_start_that_queries_an_infinite_velocity_is_rejected(learned: LearnableFamily, fixed: Family) -> None:
    """On VP at t=1: the error is raised by ``start`` and not at the first iteration."""
    with pytest.raises(ValueError, match="the velocity of the vp scheduler is infinite at t=1; use a solver that"):
        learned.start(GridSolver(fixed, 4, UNIFORM), VP())


def test_a_start_with_an_unusual_beginning_is_rejected() -> None:
    """The first time and state are not learned: on CondOT EDM's grid begins at noise level 80, from (80/81) x0."""
    solver = GridSolver(Euler(), 3, Grid("edm"))
    with pytest.raises(
        ValueError, match=r"BNS \(c, d\) starts at t=0 from 1 x0, this solver at t=0\.0123457 from 0\.98"
    ):
        OverparametrisedBNS().start(solver, CondOT())


def test_an_euler_start_over_all_states_has_the_textbook_coefficients() -> None:
    """Euler is c_ii = 1 and d_ii = h, with all other weights zero: x_{i+1} = x_i + h u_i."""
    parameters = OverparametrisedBNS().start(GridSolver(Euler(), 3, UNIFORM), CondOT())
    identity = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert parameters.tolist() == pytest.approx([1 / 3, 2 / 3, *identity, *(entry / 3 for entry in identity)])


def test_only_as_many_directions_matter_as_bns_has_parameters() -> None:
    """The Jacobian of theta has rank n(n+5)/2 - 1; the other n(n-1)/2 directions do not change the solver."""
    n = 4
    parameters = generic_parameters(OverparametrisedBNS(), AdamsBashforth(2), n)
    jacobian = torch.autograd.functional.jacobian(
        lambda p: OverparametrisedBNS().to_ns(p, CondOT(), 1.0).flat(), parameters
    )
    assert int(torch.linalg.matrix_rank(jacobian)) == n * (n + 5) // 2 - 1 == len(parameters) - n * (n - 1) // 2
