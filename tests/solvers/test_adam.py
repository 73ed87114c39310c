"""Adam distillation (BNS Algorithm 2): equality with torch's loop, divergence, the reported loss and the decay."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from distillation import FIELD, NFE, TRAINING_PAIRS, Answers, begin, pairs, run

from solvers.distil.batches import batch_indices
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import GradientQuery, LossAndGradient
from solvers.families.bns import BNS
from solvers.losses import psnr_loss
from solvers.schedulers import CondOT

SETTINGS = Adam(learning_rate=5e-3, iterations=120, batch_size=16, decay="polynomial", training_pairs=TRAINING_PAIRS)
START = begin(SETTINGS)


def test_a_run_equals_torch_adam_with_a_decaying_rate() -> None:
    """Splitting a run into states changes nothing: the result equals one plain loop over torch.optim.Adam."""
    parameters = torch.tensor(START.parameters, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=SETTINGS.learning_rate)
    x0, x1 = pairs()
    for iteration in range(8):
        optimizer.param_groups[0]["lr"] = SETTINGS.learning_rate * (1 - iteration / SETTINGS.iterations)
        indices = batch_indices(TRAINING_PAIRS, SETTINGS.batch_size, SETTINGS.seed, iteration)
        optimizer.zero_grad()
        sample = BNS().to_ns(parameters, CondOT(), 1.0).sample(FIELD, x0[indices])
        psnr_loss(sample, x1[indices]).mean().backward()
        optimizer.step()
        with torch.no_grad():
            parameters[: NFE - 1] = parameters[: NFE - 1].clamp(0, 1)
    assert run(SETTINGS, START, 8).parameters == pytest.approx(parameters.tolist(), rel=1e-12, abs=1e-14)


class _Recording(Answers):
    """Keeps the losses of gradient queries."""

    def gradient(self, query: GradientQuery) -> LossAndGradient:
        answer = super().gradient(query)
        self.losses.append(answer.loss)
        return answer


def test_the_reported_loss_is_the_mean_over_the_last_call() -> None:
    answers = _Recording()
    state = run(SETTINGS, run(SETTINGS, START, 3, answers=answers), 2, answers=answers)
    assert state.loss == pytest.approx(sum(answers.losses[3:]) / 2)


def test_learned_times_stay_in_the_domain() -> None:
    """The projection after each step brings times back even if the learning rate throws them out of [0, 1]."""
    state = run(dataclasses.replace(SETTINGS, learning_rate=0.5, decay="constant"), START, 10)
    times = state.parameters[: NFE - 1]
    assert all(0 <= t <= 1 for t in times)
    assert min(times) == 0.0 or max(times) == 1.0


# --- Divergence --------------------------------------------------------------------------------------------------


class _FailingAfter(Answers):
    """Answers ``good`` gradient queries, and ``bad`` to the others."""

    def __init__(self, good: int, bad: LossAndGradient):
        super().__init__()
        self.good, self.bad = good, bad

    def gradient(self, query: GradientQuery) -> LossAndGradient:
        return super().gradient(query) if len(self.queries) <= self.good else self.bad


ZEROS = torch.zeros(NFE * (NFE + 5) // 2 + 1, dtype=torch.float64)


@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize(
    "bad",
    [
        LossAndGradient(math.nan, ZEROS),
        LossAndGradient(math.inf, ZEROS),
        LossAndGradient(1.0, torch.full_like(ZEROS, math.nan)),
        LossAndGradient(1.0, torch.full_like(ZEROS, math.inf)),
    ],
    ids=["nan-loss", "inf-loss", "nan-gradient", "inf-gradient"],
)
def test_divergence_keeps_the_last_finite_state(bad: LossAndGradient, good: int) -> None:
    """The run stops as 'diverged' at its last good iteration and does not continue."""
    state = run(SETTINGS, START, 10, answers=_FailingAfter(good, bad))
    assert state == dataclasses.replace(run(SETTINGS, START, good), status="diverged")
    assert run(SETTINGS, state, 10) is state


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
