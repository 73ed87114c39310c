"""Distillation on several training sets at once: sums over sets, seeded batches of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from distillation import FIELD, TRAINING_PAIRS, Answers, begin, pairs, run

from orchestrator.hosts.runs import AtScale, LearnedRun
from solvers.distil.drive import drive
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import LossQuery, NormalQuery, Problem, Query, Several
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.normal_equations import normal_equations
from solvers.distil.pair_field import unconditional
from solvers.families.bns import BNS
from solvers.losses import psnr_loss
from solvers.schedulers import CondOT

HALF = TRAINING_PAIRS // 2
SETTINGS = LevenbergMarquardt(iterations=4, batch_size=HALF, training_pairs=HALF)


class Halves(Answers):
    """Answers of two training sets: the first and the second half of the training pairs."""

    def __call__(self, query: Query) -> Any:
        if isinstance(query, Several):
            return [self(single) for single in query.queries]
        assert isinstance(query, NormalQuery | LossQuery)
        self.queries.append(query)
        x0, x1 = (values[[HALF * query.pair_set + index for index in query.indices]] for values in pairs())
        if isinstance(query, LossQuery):
            with torch.no_grad():
                return float(psnr_loss(query.solver.sample(FIELD, x0), x1).mean())
        options: Any = {"jacobian": query.jacobian, "free": query.free}
        return normal_equations(query.solver, unconditional(FIELD), x0, x1, memory_bytes=2**26, **options)


def on_two_sets(settings: LevenbergMarquardt, steps: int, state: Any = None, answers: Halves | None = None) -> Any:
    """The state after ``steps`` iterations on both halves."""
    problem = Problem(BNS(), CondOT(), guidance_scales=(1.0, 2.0))
    return drive(settings.iterate(state or begin(settings), steps, problem), answers or Halves())


def test_two_halves_give_the_steps_of_the_whole() -> None:
    """A solver that is the same at both scales: the sums over two sets are those over one set of all pairs."""
    whole = dataclasses.replace(SETTINGS, batch_size=TRAINING_PAIRS, training_pairs=TRAINING_PAIRS)
    expected = torch.tensor(run(whole, begin(whole), 4).parameters)
    halves = torch.tensor(on_two_sets(SETTINGS, 4).parameters)
    assert float((expected - torch.tensor(begin(whole).parameters)).norm()) > 0.1
    torch.testing.assert_close(halves, expected, rtol=1e-6, atol=1e-8)


def test_each_set_has_its_own_seeded_batches() -> None:
    """An iteration takes other pairs of each set; the first set's batches are those of a run on it alone."""
    small = dataclasses.replace(SETTINGS, batch_size=8)
    first, second = small.batch(0, 0), small.batch(0, 1)
    assert first == small.batch(0) != second
    assert second == small.batch(0, 1) != dataclasses.replace(small, seed=1).batch(0, 1)
    growing = dataclasses.replace(SETTINGS, first_batch_size=4, batch_growth=2.0)
    assert [len(growing.batch(iteration, 1)) for iteration in range(4)] == [4, 8, 16, 32]


def test_a_resumed_run_equals_one_without_interruption() -> None:
    """The state is all that a run needs, also with several sets."""
    small = dataclasses.replace(SETTINGS, batch_size=8)
    once = on_two_sets(small, 4)
    assert on_two_sets(small, 2, state=on_two_sets(small, 2)).parameters == once.parameters


def test_the_evaluations_of_all_sets_are_counted() -> None:
    """Twice the pairs cost twice the evaluations of an iteration."""
    answers = Halves()
    both = on_two_sets(SETTINGS, 1, answers=answers)
    whole = dataclasses.replace(SETTINGS, batch_size=TRAINING_PAIRS, training_pairs=TRAINING_PAIRS)
    assert both.evaluations == run(whole, begin(whole), 1).evaluations
    assert {query.pair_set for query in answers.queries if isinstance(query, NormalQuery)} == {0, 1}


def test_a_method_of_one_set_refuses_several() -> None:
    """Adam asks for one gradient at a time; the message names the method that learns from several."""
    sets = (AtScale(1.0, "a-8"), AtScale(2.0, "b-8"))
    with pytest.raises(
        ValueError, match=r"'adam'.* learns from one set of training pairs, not from 2; use method 'lev"
    ):
        LearnedRun(family="bns", options={}, sigma0=1.0, train=sets, method=Adam())
    LearnedRun(family="bns", options={}, sigma0=1.0, train=sets, method=SETTINGS)
