"""Runs that share model batches learn what they learn alone, to the rounding of the network; sharing is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from orchestrator.config.pair_plan import PairKey
from orchestrator.config.sections import Resources
from orchestrator.hosts.batching import Batching, Shape
from orchestrator.hosts.distillation import LearnedRun, Settings
from orchestrator.hosts.host import AdvanceArguments, Host
from orchestrator.hosts.lockstep import RequestGroup
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.distil.adam import AdamSettings
from solvers.distil.levenberg_marquardt import LMSettings
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

#: What a batch of another size does to a float32 network, after some steps of Adam.
BATCH_ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def host(made: Storage, host_settings: Callable[..., HostSettings], specs: dict[PairKey, PairSpec]) -> Host:
    """A host of its own, whose measurements a test may set."""
    return Host(host_settings(made))


@pytest.fixture
def train(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[PairKey("train", 1.0, 0)].digest


def _faster_by_merging(host: Host, *shapes: Shape, up_to: int = 8) -> None:
    """Set what the host has measured: a test must not depend on how busy the machine is."""
    sizes = [2**power for power in range(4)]
    host.batching_statistics().seconds_per_sample.update(
        {shape: {size: 1 / min(size, up_to) for size in sizes} for shape in shapes}
    )


def _call(
    facts: ModelFacts,
    train: str,
    settings: Settings | None = None,
    *,
    nfe: int = 4,
    family: str = "bns",
    sigma0: float = 1.0,
    steps: int = 6,
    **options: Any,
) -> AdvanceArguments:
    """The first steps of a run that starts from Midpoint."""
    adam = settings or AdamSettings(learning_rate=5e-3, iterations=20, batch_size=16, training_pairs=48)
    run = LearnedRun(family=family, options={}, sigma0=sigma0, train=train, settings=adam, **options)
    start = run.build().start(GridSolver(Midpoint(), nfe, Grid(), sigma0), facts.scheduler)
    return AdvanceArguments(run=run, state=run.begin(start), steps=steps)


def _adam(**changed: Any) -> AdamSettings:
    return AdamSettings(**{"learning_rate": 5e-3, "iterations": 20, "batch_size": 16, "training_pairs": 48, **changed})


@pytest.fixture
def different(facts: ModelFacts, train: str) -> list[AdvanceArguments]:
    """Four runs of one NFE that differ in family, start, learning rate, decay, seed and sigma0."""
    return [
        _call(facts, train),
        _call(facts, train, _adam(learning_rate=1e-2, seed=3)),
        _call(facts, train, _adam(decay="cosine", seed=1), sigma0=1.5),
        _call(facts, train, _adam(learning_rate=1e-3), family="bespoke_rk2"),
    ]


def test_a_run_in_company_learns_what_it_learns_alone(host: Host, different: list[AdvanceArguments]) -> None:
    """One batch for all, and then each its own Adam step: equal to the rounding of the network."""
    _faster_by_merging(host, Shape(16, 1.0))
    for found, call in zip(host.advance_batched(different), different, strict=True):
        alone = host.advance(**call)
        np.testing.assert_allclose(found.parameters, alone.parameters, **BATCH_ROUNDING)
        assert (found.iteration, found.status) == (alone.iteration, alone.status) == (6, "running")
    assert host.batching_statistics().batched == 6 * len(different)


@pytest.mark.parametrize("company", [2, 3])
def test_the_number_of_companions_changes_rounding_alone(
    host: Host, different: list[AdvanceArguments], company: int
) -> None:
    """Nothing but the size of a batch passes from one run to another."""
    _faster_by_merging(host, Shape(16, 1.0))
    whole, part = host.advance_batched(different), host.advance_batched(different[:company])
    for one, other in zip(whole, part, strict=False):
        np.testing.assert_allclose(one.parameters, other.parameters, **BATCH_ROUNDING)


def test_adams_state_and_the_loss_go_on_as_alone(host: Host, different: list[AdvanceArguments]) -> None:
    """Moments and losses are in the state that is stored: a run may go on in other company, or in none."""
    _faster_by_merging(host, Shape(16, 1.0))
    found, alone = host.advance_batched(different)[1], host.advance(**different[1])
    assert found.loss == pytest.approx(alone.loss, rel=1e-4)
    assert [field.name for field in dataclasses.fields(found)] == [field.name for field in dataclasses.fields(alone)]
    np.testing.assert_allclose(found.exp_avg_sq, alone.exp_avg_sq, rtol=1e-2)


def test_a_single_run_is_advanced_to_the_bit_as_alone(host: Host, different: list[AdvanceArguments]) -> None:
    """No company, no rounding: resuming such a run gives what an uninterrupted one gives."""
    _faster_by_merging(host, Shape(16, 1.0))
    assert host.advance_batched(different[:1]) == [host.advance(**different[0])]


def test_where_merging_does_not_pay_every_run_is_itself_to_the_bit(
    host: Host, different: list[AdvanceArguments]
) -> None:
    """A model that fills the device with one batch is asked batch by batch."""
    _faster_by_merging(host, Shape(16, 1.0), up_to=1)
    assert host.advance_batched(different) == [host.advance(**call) for call in different]


def test_a_run_that_ends_leaves_the_others_to_go_on(host: Host, facts: ModelFacts, train: str) -> None:
    """Three iterations and no more, or numbers that are not finite: the companion's steps are its own."""
    _faster_by_merging(host, Shape(16, 1.0))
    short = _call(facts, train, _adam(iterations=3))
    lost = _call(facts, train)
    lost["state"] = dataclasses.replace(lost["state"], parameters=[0.5] * 3 + [1e200] * 14)
    long = _call(facts, train)
    states = host.advance_batched([short, lost, long])
    assert [(state.status, state.iteration) for state in states] == [("finished", 3), ("diverged", 0), ("running", 6)]
    np.testing.assert_allclose(states[2].parameters, host.advance(**long).parameters, **BATCH_ROUNDING)


def test_blocks_of_large_batches_are_merged_by_their_size(host: Host, facts: ModelFacts, train: str) -> None:
    """48 pairs in blocks of 64 are one; each block's sum is its own."""
    _faster_by_merging(host, Shape(48, 1.0), Shape(16, 1.0))
    calls = [_call(facts, train, _adam(batch_size=size), steps=2) for size in (48, 16, 48)]
    for found, call in zip(host.advance_batched(calls), calls, strict=True):
        np.testing.assert_allclose(found.parameters, host.advance(**call).parameters, **BATCH_ROUNDING)
    assert host.batching_statistics().batched == 2 * 2


def test_what_cannot_share_a_batch_is_answered_alone(host: Host, facts: ModelFacts, train: str) -> None:
    """Another NFE, another objective, another method: to the bit what it is alone."""
    _faster_by_merging(host, Shape(16, 1.0))
    lm = LMSettings(iterations=2, batch_size=16, training_pairs=48)
    calls = [
        _call(facts, train, steps=2),
        _call(facts, train, nfe=6, steps=2),
        _call(facts, train, objective="rmse", steps=2),
        _call(facts, train, lm, steps=1),
    ]
    assert host.advance_batched(calls) == [host.advance(**call) for call in calls]
    assert host.batching_statistics().batched == 0


def test_guided_runs_share_batches_and_unguided_ones_others(
    storage: Storage,
    host_settings: Callable[..., HostSettings],
    facts: ModelFacts,
    specs: dict[PairKey, PairSpec],
) -> None:
    """Guidance belongs to the pairs: runs of two scales meet in one call and not in one batch."""
    small = specs[PairKey("validation", 1.0, 0)]
    stores = {
        scale: dataclasses.replace(small, guidance_scale=scale, count=8, batch_size=8, shard_size=8)
        for scale in (1.0, 3.0)
    }
    ensure_pairs(
        storage, list(stores.values()), LocalPool(Host(host_settings(storage))), wait=True, note=lambda text: None
    )
    host = Host(host_settings(storage))
    _faster_by_merging(host, Shape(8, 1.0), Shape(8, 3.0))
    settings = _adam(batch_size=8, training_pairs=8)
    calls = [_call(facts, stores[scale].digest, settings, steps=2) for scale in (1.0, 3.0, 3.0, 1.0)]
    for found, call in zip(host.advance_batched(calls), calls, strict=True):
        np.testing.assert_allclose(found.parameters, host.advance(**call).parameters, **BATCH_ROUNDING)
    statistics = host.batching_statistics()
    assert (statistics.batched, statistics.batches) == (8, 4)


# ---- when it pays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("microseconds", "batches"),
    [
        ({1: 52, 2: 40, 4: 30, 8: 21}, [7]),  # falls to the end: all at once
        ({1: 52, 2: 30, 4: 29.5}, [2, 2, 2]),  # two fill the device; the seventh is alone
        ({1: 52, 2: 51, 4: 20}, [7]),  # a small gain at two hides no large one at four
        ({1: 52, 2: 60, 4: 51}, []),  # never pays
    ],
)
def test_as_many_are_merged_as_make_a_sample_faster(
    host: Host, facts: ModelFacts, train: str, microseconds: dict[int, float], batches: list[int]
) -> None:
    """The least size beyond which the time of a sample does not fall: more would take memory for nothing."""
    host.batching_statistics().seconds_per_sample[Shape(16, 1.0)] = microseconds
    host.advance_batched([_call(facts, train, _adam(seed=seed), steps=1) for seed in range(7)])
    statistics = host.batching_statistics()
    assert (statistics.batched, statistics.batches) == (sum(batches), len(batches))


def test_each_size_is_timed_once_on_the_network(
    host: Host, facts: ModelFacts, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes 1, 2 and 4 for five runs; the next call of these runs times nothing."""
    timed: list[int] = []
    real = Batching._seconds_per_sample

    def watched(self: Batching, shape: Shape, calls: Any) -> float:
        timed.append(len(calls))
        return real(self, shape, calls)

    monkeypatch.setattr(Batching, "_seconds_per_sample", watched)
    calls = [_call(facts, train, _adam(seed=seed), steps=1) for seed in range(5)]
    host.advance_batched(calls)
    host.advance_batched(calls)
    assert timed == [1, 2, 4]
    seconds = host.batching_statistics().seconds_per_sample[Shape(16, 1.0)]
    assert all(0 < value < 1 for value in seconds.values())


def test_batches_that_do_not_fit_are_asked_again_in_smaller_ones(
    host: Host, different: list[AdvanceArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step holds every evaluation, the timed call one: what fits is found out, once, and told in the statistics."""
    _faster_by_merging(host, Shape(16, 1.0))
    real = Batching._answer_batch

    def small(self: Batching, shape: Shape, calls: Any) -> Any:
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, shape, calls)

    monkeypatch.setattr(Batching, "_answer_batch", small)
    for found, call in zip(host.advance_batched(different), different, strict=True):
        np.testing.assert_allclose(found.parameters, host.advance(**call).parameters, **BATCH_ROUNDING)
    statistics = host.batching_statistics()
    assert (statistics.out_of_memory, statistics.batches) == (1, 12)


def test_a_question_without_company_is_asked_as_it_is(host: Host, train: str) -> None:
    """The last run of a group needs no measurement and no other path."""
    asked: list[str] = []
    batching = Batching(lambda method, arguments: asked.append(method), host._select, host.model.field)
    call = {"theta": np.zeros(19), "pairs": train, "indices": [0, 1]}
    batching.answer([RequestGroup("loss_and_gradient", [call, call])])
    assert (asked, batching.statistics.requests) == (["loss_and_gradient"] * 2, 0)


# ---- who may be batched --------------------------------------------------------------------------------------------


def test_runs_that_can_share_batches_have_one_key(facts: ModelFacts, different: list[AdvanceArguments]) -> None:
    """Family, start, rate, seed and sigma0 are each run's own."""
    assert len({call["run"].batch_key(4, 1.0) for call in different}) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"nfe": 6},
        {"guidance_scale": 3.0},
        {"settings": _adam(batch_size=8)},
        {"settings": LMSettings(iterations=2, batch_size=16, training_pairs=48)},
        {"objective": "rmse"},
    ],
)
def test_runs_that_cannot_share_batches_have_others(facts: ModelFacts, train: str, changed: dict[str, Any]) -> None:
    """They would only wait for each other."""
    run = _call(facts, train)["run"]
    other = dataclasses.replace(run, **{key: changed[key] for key in ("settings", "objective") if key in changed})
    assert other.batch_key(changed.get("nfe", 4), changed.get("guidance_scale", 1.0)) != run.batch_key(4, 1.0)


def test_the_pool_in_this_process_merges_nothing(pool: LocalPool, facts: ModelFacts, train: str) -> None:
    """What is computed without Ray is each run's own to the bit."""
    calls = [_call(facts, train, steps=1) for _ in range(2)]
    before = pool.host.batching_statistics().requests  # the host is shared with other tests
    answers = pool.gather([Request("advance", dict(call), "one key") for call in calls])
    assert answers == [pool.host.advance(**call) for call in calls]
    assert pool.host.batching_statistics().requests == before


def test_a_sweep_merges_eight_runs_at_most_unless_told_otherwise() -> None:
    assert Resources().batch_runs == 8
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Resources(batch_runs=0)
