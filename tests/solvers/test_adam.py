"""Adam distillation (BNS Algorithm 2): bit-exact resuming, improvement over the start, handling of divergence."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from oracles import fine_rk4, mixture, noise
from torch import Tensor

from solvers.distil.batches import batch_indices
from solvers.distil.methods.adam import DIVERGENCE_DB, Adam, AdamState, LossAndGradient, Status, advance
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family, GridSolver
from solvers.families.bns import BNS
from solvers.families.euler import Euler
from solvers.grids import UNIFORM
from solvers.losses import per_sample_mse, psnr_db, psnr_loss
from solvers.ns import NSSolver
from solvers.schedulers import CondOT

FAMILY = BNS()
FIELD = mixture().field(CondOT())
NFE = 4
TRAINING_PAIRS = 64
SETTINGS = Adam(learning_rate=5e-3, iterations=120, batch_size=16, decay="polynomial", training_pairs=TRAINING_PAIRS)


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """(x0, x1) of the mixture's exact ODE: the training pairs first, then 64 validation pairs."""
    x0 = noise(TRAINING_PAIRS + 64, 2)
    return x0, fine_rk4(FIELD, x0, 0.0, 1.0, steps=100)


def objective(solver: NSSolver, indices: list[int]) -> LossAndGradient:
    """BNS eq. 13 on the training pairs."""
    x0, x1 = (values[indices] for values in pairs())
    theta = solver.flat().requires_grad_()
    loss = psnr_loss(NSSolver.from_flat(theta).sample(FIELD, x0), x1).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return LossAndGradient(float(loss.detach()), gradient)


def validation_psnr(state: AdamState, sigma0: float = 1.0) -> float:
    parameters = torch.tensor(state.parameters, dtype=torch.float64)
    x0, x1 = (values[TRAINING_PAIRS:] for values in pairs())
    sample = FAMILY.to_ns(parameters, CondOT(), sigma0).sample(FIELD, x0)
    return float(psnr_db(per_sample_mse(sample, x1), data_range=2.0).mean())


def begin(family: Family | None = None, sigma0: float = 1.0) -> AdamState:
    solver = GridSolver(family or Euler(), NFE, UNIFORM, sigma0)
    return AdamState.begin(FAMILY.start(solver, CondOT()))


def run(
    state: AdamState,
    steps: int,
    settings: Adam = SETTINGS,
    sigma0: float = 1.0,
    ask: Callable[[NSSolver, list[int]], LossAndGradient] = objective,
) -> AdamState:
    return advance(state, steps, settings, FAMILY, CondOT(), sigma0, ask)


# --- Resuming ----------------------------------------------------------------------------------------------------


def _through_json(state: AdamState) -> AdamState:
    return AdamState(**json.loads(json.dumps(dataclasses.asdict(state))))


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
@pytest.mark.parametrize("carry", [lambda state: state, _through_json], ids=["in-memory", "through-json"])
def test_two_short_advances_equal_one_long_advance(carry: Callable[[AdamState], AdamState], sigma0: float) -> None:
    """Bit for bit, even through JSON: a run can stop and resume at any iteration on any host."""
    single = run(begin(sigma0=sigma0), 12, sigma0=sigma0)
    split = run(carry(run(begin(sigma0=sigma0), 6, sigma0=sigma0)), 6, sigma0=sigma0)
    for name in ("parameters", "exp_avg", "exp_avg_sq", "iteration", "status"):
        assert getattr(split, name) == getattr(single, name), name
    assert single.parameters != begin(sigma0=sigma0).parameters


def test_a_state_with_validations_survives_a_json_round_trip() -> None:
    state = run(begin().with_validation(20.0), 3).with_validation(21.5)
    assert _through_json(state) == state
    assert [entry["iteration"] for entry in state.validated] == [0, 3]


def test_advance_equals_torch_adam_with_a_decaying_rate() -> None:
    """Splitting a run into states changes nothing: the result equals one plain loop over torch.optim.Adam."""
    parameters = torch.tensor(begin().parameters, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=SETTINGS.learning_rate)
    x0, x1 = pairs()
    for iteration in range(8):
        optimizer.param_groups[0]["lr"] = SETTINGS.learning_rate * (1 - iteration / SETTINGS.iterations)
        indices = batch_indices(TRAINING_PAIRS, SETTINGS.batch_size, SETTINGS.seed, iteration)
        optimizer.zero_grad()
        sample = FAMILY.to_ns(parameters, CondOT(), 1.0).sample(FIELD, x0[indices])
        psnr_loss(sample, x1[indices]).mean().backward()
        optimizer.step()
        with torch.no_grad():
            parameters[: NFE - 1] = parameters[: NFE - 1].clamp(0, 1)
    assert run(begin(), 8).parameters == pytest.approx(parameters.tolist(), rel=1e-12, abs=1e-14)


def test_the_reported_loss_is_the_mean_over_the_last_call() -> None:
    losses: list[float] = []

    def recording(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        result = objective(solver, indices)
        losses.append(result.loss)
        return result

    state = run(run(begin(), 3, ask=recording), 2, ask=recording)
    assert state.loss == pytest.approx(sum(losses[3:]) / 2)


# --- Learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "sigma0"), [(Euler(), 1.0), (AdamsBashforth(2), 1.0), (Euler(), 2.0)], ids=["Euler", "AB2", "sigma0=2"]
)
def test_a_learned_solver_beats_its_start_on_fresh_noise(start: Family, sigma0: float) -> None:
    """120 iterations at NFE 4 on a mixture's exact field gain more than 3 dB on held-out pairs."""
    first = begin(start, sigma0)
    last = run(first, SETTINGS.iterations, sigma0=sigma0)
    assert (last.status, last.iteration) == ("finished", SETTINGS.iterations)
    assert validation_psnr(last, sigma0) > validation_psnr(first, sigma0) + 3


def test_learned_times_stay_in_the_domain() -> None:
    """The projection after each step brings times back even if the learning rate throws them out of [0, 1]."""
    state = run(begin(), 10, dataclasses.replace(SETTINGS, learning_rate=0.5, decay="constant"))
    times = state.parameters[: NFE - 1]
    assert all(0 <= t <= 1 for t in times)
    assert min(times) == 0.0 or max(times) == 1.0


# --- End of a run ------------------------------------------------------------------------------------------------


def test_a_run_stops_after_its_last_iteration() -> None:
    settings = dataclasses.replace(SETTINGS, iterations=5)
    state = run(begin(), 100, settings)
    assert (state.status, state.iteration) == ("finished", 5)
    assert run(state, 10, settings) is state


@pytest.mark.parametrize("status", [status for status in get_args(Status) if status != "running"])
def test_an_ended_run_is_not_advanced(status: Status) -> None:
    """This holds for every ended status: finished, diverged, or stopped by a search."""
    state = dataclasses.replace(begin(), status=status)
    assert run(state, 3) is state


def _failing_after(good: int, bad: LossAndGradient) -> Callable[[NSSolver, list[int]], LossAndGradient]:
    calls = 0

    def ask(solver: NSSolver, indices: list[int]) -> LossAndGradient:
        nonlocal calls
        calls += 1
        return objective(solver, indices) if calls <= good else bad

    return ask


THETA_SIZE = NFE * (NFE + 5) // 2 + 1
ZEROS = torch.zeros(THETA_SIZE, dtype=torch.float64)


@pytest.mark.parametrize(
    "bad",
    [
        LossAndGradient(math.nan, ZEROS),
        LossAndGradient(math.inf, ZEROS),
        LossAndGradient(1.0, torch.full_like(ZEROS, math.nan)),
    ],
    ids=["nan-loss", "inf-loss", "nan-gradient"],
)
def test_divergence_keeps_the_last_finite_parameters(bad: LossAndGradient) -> None:
    """The run stops as 'diverged' at its last good iteration and does not continue."""
    state = run(begin(), 10, ask=_failing_after(3, bad))
    assert (state.status, state.iteration) == ("diverged", 3)
    assert state.parameters == run(begin(), 3).parameters
    assert state.exp_avg == run(begin(), 3).exp_avg
    assert state.loss is not None
    assert math.isfinite(state.loss)
    assert run(state, 10) is state


def test_divergence_in_the_first_iteration_keeps_the_start() -> None:
    state = run(begin(), 10, ask=_failing_after(0, LossAndGradient(math.nan, ZEROS)))
    assert (state.status, state.iteration, state.loss) == ("diverged", 0, None)
    assert state.parameters == begin().parameters


@pytest.mark.parametrize("psnr", [math.nan, -math.inf])
def test_a_non_finite_validation_counts_as_divergence(psnr: float) -> None:
    """The value is not recorded either, because comparisons with NaN are meaningless."""
    state = begin().with_validation(30.0).with_validation(psnr)
    assert (state.status, len(state.validated)) == ("diverged", 1)


def test_a_validation_far_below_the_start_counts_as_divergence() -> None:
    start = begin().with_validation(30.0)
    assert start.with_validation(30.0 - DIVERGENCE_DB + 0.1).status == "running"
    assert start.with_validation(30.0 - DIVERGENCE_DB - 0.1).status == "diverged"


# --- Best iterate ------------------------------------------------------------------------------------------------


def test_the_best_validated_iterate_is_kept_rather_than_the_last() -> None:
    """Algorithm 2 returns the best iterate over all validations."""
    state = begin().with_validation(20.0)
    state = run(state, 2).with_validation(25.0)
    better = state.parameters
    state = run(state, 2).with_validation(24.0)
    assert (state.best["iteration"], state.best["psnr_db"]) == (2, 25.0)
    assert state.best["parameters"] == better != state.parameters


def test_the_start_is_the_best_iterate_if_nothing_improved() -> None:
    """A distilled solver is never worse on validation than its start."""
    state = run(begin().with_validation(20.0), 2).with_validation(19.0)
    assert state.best["iteration"] == 0
    assert state.best["parameters"] == begin().parameters


def test_the_best_iterate_is_undefined_before_any_validation() -> None:
    with pytest.raises(ValueError, match="no iterate has been validated yet"):
        _ = begin().best


# --- Learning-rate decay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("polynomial", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_follows_its_decay(decay: str, expected: list[float]) -> None:
    """At 0, 1/4, 1/2 and the end of the run: linear to zero (BNS D.1), half a cosine, or constant."""
    settings = Adam(learning_rate=2e-3, iterations=1000, decay=decay)  # type: ignore[arg-type]
    rates = [settings.rate(iteration) for iteration in (0, 250, 500, 1000)]
    assert rates == pytest.approx([2e-3 * share for share in expected], abs=1e-15)
