"""Contract of distillation methods: bit-exact resuming, gains over the start, ends of a run, and the cost they report.

Every method of ``solvers/distil/methods`` is tested, and the third one that docs/extending.md shows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pkgutil
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from distillation import TRAINING_PAIRS, Answers, begin, run, third_method, validation_psnr

import solvers.distil.methods
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import Method
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.state import DIVERGENCE_DB, LEAST_GAIN_DB, DistillationState, Status
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import Family
from solvers.families.euler import Euler
from solvers.field import FunctionField
from solvers.schedulers import CondOT

METHODS: dict[str, Method] = {
    "adam": Adam(learning_rate=5e-3, iterations=120, batch_size=16, training_pairs=TRAINING_PAIRS),
    "levenberg_marquardt": LevenbergMarquardt(iterations=6, batch_size=32, training_pairs=TRAINING_PAIRS),
    "levenberg_marquardt, growing batches": LevenbergMarquardt(
        iterations=6, first_batch_size=8, batch_growth=1.5, batch_size=48, training_pairs=TRAINING_PAIRS
    ),
    "gradient_descent": third_method()(rate=2e-4, iterations=60, batch_size=16, training_pairs=TRAINING_PAIRS),  # type: ignore[call-arg]
}

GAIN_DB = {
    "adam": 3.0,
    "levenberg_marquardt": 10.0,
    "levenberg_marquardt, growing batches": 10.0,
    "gradient_descent": 0.3,
}


def test_every_method_is_under_contract() -> None:
    shipped = {module.name for module in pkgutil.iter_modules(solvers.distil.methods.__path__)} - {"base"}
    assert shipped == {method.name for method in METHODS.values()} - {"gradient_descent"}


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(name: str) -> Method:
    return METHODS[name]


# --- Resuming ----------------------------------------------------------------------------------------------------


def _through_json(state: DistillationState) -> DistillationState:
    return type(state)(**json.loads(json.dumps(dataclasses.asdict(state))))


@pytest.mark.parametrize("sigma0", [1.0, 2.0])
@pytest.mark.parametrize("carry", [lambda state: state, _through_json], ids=["in-memory", "through-json"])
def test_two_short_calls_equal_one_long_call(method: Method, carry: Callable[[Any], Any], sigma0: float) -> None:
    """Bit for bit, even through JSON: a run can stop and resume at any iteration on any host."""
    first = begin(method, sigma0=sigma0)
    single = run(method, first, 4, sigma0=sigma0)
    split = run(method, carry(run(method, first, 2, sigma0=sigma0)), 2, sigma0=sigma0)
    assert dataclasses.replace(split, loss=None) == dataclasses.replace(single, loss=None)
    assert single.parameters != first.parameters


def test_a_state_with_validations_survives_a_json_round_trip(method: Method) -> None:
    state = run(method, begin(method).with_validation(20.0), 2).with_validation(31.5)
    assert _through_json(state) == state
    assert [entry["iteration"] for entry in state.validated] == [0, 2]


# --- Learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "sigma0"), [(Euler(), 1.0), (AdamsBashforth(2), 1.0), (Euler(), 2.0)], ids=["Euler", "AB2", "sigma0=2"]
)
def test_a_run_beats_its_start_on_fresh_noise(name: str, method: Method, start: Family, sigma0: float) -> None:
    """From any start, and through the chain rule of a preconditioned path."""
    first = begin(method, start, sigma0=sigma0)
    last = run(method, first, method.iterations, sigma0=sigma0)
    assert (last.status, last.iteration) == ("finished", method.iterations)
    assert validation_psnr(last, sigma0) > validation_psnr(first, sigma0) + GAIN_DB[name]


def test_the_reported_evaluations_match_those_made(method: Method) -> None:
    """Forwards as counted at the field; a backward for each if the method takes gradients."""
    answers = Answers()
    state = run(method, begin(method), 3, answers=answers)
    forwards, backwards = method.evaluations(state, 4)
    assert forwards == answers.evaluations > 0
    assert backwards == (forwards if method.has_backward else 0)


def _constant_batches(method: Method) -> Method:
    """The method without batches that grow, which cannot grow to one pair."""
    if isinstance(method, LevenbergMarquardt):
        return dataclasses.replace(method, first_batch_size=None, batch_growth=1.0)
    return method


@pytest.mark.parametrize(("pairs", "batch_size"), [(8, 64), (1, 64), (1, 1)])
def test_a_batch_consists_of_training_pairs(method: Method, pairs: int, batch_size: int) -> None:
    """With fewer pairs than the batch size, every iteration takes all of them; a single pair is enough to run."""
    answers = Answers()
    if batch_size == 1:
        method = _constant_batches(method)
    few = dataclasses.replace(method, training_pairs=pairs, batch_size=batch_size)
    state = run(few, begin(few), 2, answers=answers)
    assert all(sorted(query.indices) == list(range(pairs)) for query in answers.queries)
    assert (state.iteration, state.status) == (2, "running")
    assert all(map(math.isfinite, state.parameters))


def test_batches_of_one_pair_take_turns(method: Method) -> None:
    """A batch of one of many pairs: an epoch takes each of them once."""
    ones = dataclasses.replace(_constant_batches(method), training_pairs=4, batch_size=1)
    assert sorted(index for iteration in range(4) for index in ones.batch(iteration)) == [0, 1, 2, 3]


# --- End of a run ------------------------------------------------------------------------------------------------


def test_a_run_stops_after_its_last_iteration(method: Method) -> None:
    short = dataclasses.replace(method, iterations=2)
    state = run(short, begin(short), 100)
    assert (state.status, state.iteration) == ("finished", 2)


@pytest.mark.parametrize("status", [status for status in get_args(Status) if status != "running"])
def test_an_ended_run_is_not_advanced(method: Method, status: Status) -> None:
    """This holds for every ended status: finished, diverged, stalled, or stopped by a search."""
    state = dataclasses.replace(begin(method), status=status)
    answers = Answers()
    assert run(method, state, 3, answers=answers) is state
    assert answers.queries == []


def test_a_non_finite_start_is_rejected(method: Method) -> None:
    with pytest.raises(ValueError, match="1 of 3 starting parameters are not finite; choose another start"):
        method.begin(torch.tensor([1.0, math.nan, 0.0], dtype=torch.float64))


def test_nan_from_the_model_never_reaches_theta(method: Method) -> None:
    """The run ends, and keeps its start."""
    broken = FunctionField(lambda x, t: torch.full_like(x, math.nan), CondOT())
    last = run(method, begin(method), 10, answers=Answers(broken))
    assert last.status in ("diverged", "stalled")
    assert last.parameters == begin(method).parameters


# --- Validations -------------------------------------------------------------------------------------------------

STATE = DistillationState(parameters=[0.0])


@pytest.mark.parametrize("psnr", [math.nan, -math.inf])
def test_a_non_finite_validation_counts_as_divergence(psnr: float) -> None:
    """The value is not recorded either, because comparisons with NaN are meaningless."""
    state = STATE.with_validation(30.0).with_validation(psnr)
    assert (state.status, len(state.validated)) == ("diverged", 1)


def test_a_validation_far_below_the_start_counts_as_divergence() -> None:
    start = STATE.with_validation(30.0)
    assert start.with_validation(30.0 - DIVERGENCE_DB + 0.1).status == "running"
    assert start.with_validation(30.0 - DIVERGENCE_DB - 0.1).status == "diverged"


def test_the_best_validated_iterate_is_kept_rather_than_the_last() -> None:
    """Algorithm 2 returns the best iterate over all validations; the start itself is one of them."""
    state = STATE
    for iteration, psnr in enumerate([20.0, 25.0, 24.0]):
        state = dataclasses.replace(state, iteration=iteration, parameters=[float(iteration)]).with_validation(psnr)
    assert state.best == {"iteration": 1, "psnr_db": 25.0, "parameters": [1.0]}
    worse = dataclasses.replace(STATE.with_validation(20.0), iteration=2, parameters=[2.0]).with_validation(19.0)
    assert worse.best["parameters"] == STATE.parameters


def test_the_best_iterate_is_undefined_before_any_validation() -> None:
    with pytest.raises(ValueError, match="no iterate has been validated yet"):
        _ = STATE.best


def test_a_run_converges_once_validations_no_longer_gain() -> None:
    """A gain too small to matter does not count, and a run without patience goes on."""
    state = STATE
    for psnr in (30.0, 31.0, 31.0 + LEAST_GAIN_DB / 2, 30.5):
        state = state.with_validation(psnr, patience=3)
        assert state.status == "running"
    assert state.with_validation(31.0 + LEAST_GAIN_DB, patience=3).status == "running"
    assert state.with_validation(30.9).status == "running"
    assert state.with_validation(30.9, patience=3).status == "converged"
