"""Batched runs learn what they learn alone, up to the network's rounding, and are batched only if that is faster."""

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
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.hosts.runs import LearnedRun
from orchestrator.hosts.settings import HostSettings
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import Method
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

#: Effect of another batch size on a float32 network, after a few steps of Adam.
BATCH_ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def host(made: Storage, host_settings: Callable[..., HostSettings], specs: dict[PairKey, PairSpec]) -> Host:
    """A separate host, so that a test may set its timings."""
    return Host(host_settings(made))


@pytest.fixture
def train_digest(specs: dict[PairKey, PairSpec]) -> str:
    """Digest of the training pairs."""
    return specs[PairKey("train", 1.0, 0)].name


def _set_timings(host: Host, *shapes: Shape, up_to: int = 8) -> None:
    """Set the host's timings, so that a test does not depend on the machine's load; batching pays up to ``up_to``."""
    sizes = [2**power for power in range(4)]
    host.batching_statistics().seconds_per_sample.update(
        {shape: {size: 1 / min(size, up_to) for size in sizes} for shape in shapes}
    )


def _advance_arguments(
    facts: ModelFacts,
    train_digest: str,
    settings: Method | None = None,
    *,
    nfe: int = 4,
    family: str = "bns",
    sigma0: float = 1.0,
    steps: int = 6,
    **options: Any,
) -> dict[str, Any]:
    """Arguments for the first steps of a run that starts from Midpoint."""
    adam = settings or Adam(learning_rate=5e-3, iterations=20, batch_size=16, training_pairs=48)
    run = LearnedRun(family=family, options={}, sigma0=sigma0, train=train_digest, method=adam, **options)
    start = run.build().start(GridSolver(Midpoint(), nfe, Grid(), sigma0), facts.scheduler)
    return {"run": run, "state": run.method.begin(start), "steps": steps}


def _adam(**changed: Any) -> Adam:
    return Adam(**{"learning_rate": 5e-3, "iterations": 20, "batch_size": 16, "training_pairs": 48, **changed})


@pytest.fixture
def different_runs(facts: ModelFacts, train_digest: str) -> list[dict[str, Any]]:
    """Four runs of one NFE that differ in family, start, learning rate, decay, seed and sigma0."""
    return [
        _advance_arguments(facts, train_digest),
        _advance_arguments(facts, train_digest, _adam(learning_rate=1e-2, seed=3)),
        _advance_arguments(facts, train_digest, _adam(decay="cosine", seed=1), sigma0=1.5),
        _advance_arguments(facts, train_digest, _adam(learning_rate=1e-3), family="bespoke_rk2"),
    ]


def test_a_batched_run_learns_what_it_learns_alone(host: Host, different_runs: list[dict[str, Any]]) -> None:
    """All runs share one model batch, and each takes its own Adam step: equal up to the rounding of the network."""
    _set_timings(host, Shape(16, 1.0))
    for batched, request in zip(host.advance_batched(different_runs), different_runs, strict=True):
        alone = host.advance(**request)
        np.testing.assert_allclose(batched.parameters, alone.parameters, **BATCH_ROUNDING)
        assert (batched.iteration, batched.status) == (alone.iteration, alone.status) == (6, "running")
    assert host.batching_statistics().batched == 6 * len(different_runs)


@pytest.mark.parametrize("runs", [2, 3])
def test_the_number_of_batched_runs_changes_only_rounding(
    host: Host, different_runs: list[dict[str, Any]], runs: int
) -> None:
    """Runs affect each other only through the size of the batch."""
    _set_timings(host, Shape(16, 1.0))
    from_all, from_some = host.advance_batched(different_runs), host.advance_batched(different_runs[:runs])
    for one, other in zip(from_all, from_some, strict=False):
        np.testing.assert_allclose(one.parameters, other.parameters, **BATCH_ROUNDING)


def test_adams_state_and_the_loss_are_those_of_a_run_alone(host: Host, different_runs: list[dict[str, Any]]) -> None:
    """Moments and losses are part of the stored state, since a run may go on in another batch or alone."""
    _set_timings(host, Shape(16, 1.0))
    batched, alone = host.advance_batched(different_runs)[1], host.advance(**different_runs[1])
    assert batched.loss == pytest.approx(alone.loss, rel=1e-4)
    assert [field.name for field in dataclasses.fields(batched)] == [field.name for field in dataclasses.fields(alone)]
    np.testing.assert_allclose(batched.exp_avg_sq, alone.exp_avg_sq, rtol=1e-2)


def test_a_batched_call_of_one_run_returns_the_same_bits_as_a_plain_call(
    host: Host, different_runs: list[dict[str, Any]]
) -> None:
    """A run on its own is rounded the same way: resumed, it returns what an uninterrupted run returns."""
    _set_timings(host, Shape(16, 1.0))
    assert host.advance_batched(different_runs[:1]) == [host.advance(**different_runs[0])]


def test_if_batching_does_not_pay_every_run_returns_the_same_bits_as_alone(
    host: Host, different_runs: list[dict[str, Any]]
) -> None:
    """A model that fills the device with one run's batch is evaluated run by run."""
    _set_timings(host, Shape(16, 1.0), up_to=1)
    assert host.advance_batched(different_runs) == [host.advance(**request) for request in different_runs]


def test_a_run_that_ends_does_not_stop_the_others(host: Host, facts: ModelFacts, train_digest: str) -> None:
    """One run has only three iterations, and one diverges; the third takes the steps it takes alone."""
    _set_timings(host, Shape(16, 1.0))
    short = _advance_arguments(facts, train_digest, _adam(iterations=3))
    diverging = _advance_arguments(facts, train_digest)
    diverging["state"] = dataclasses.replace(diverging["state"], parameters=[0.5] * 3 + [1e200] * 14)
    long = _advance_arguments(facts, train_digest)
    states = host.advance_batched([short, diverging, long])
    assert [(state.status, state.iteration) for state in states] == [("finished", 3), ("diverged", 0), ("running", 6)]
    np.testing.assert_allclose(states[2].parameters, host.advance(**long).parameters, **BATCH_ROUNDING)


def test_blocks_are_batched_with_blocks_of_equal_size(host: Host, facts: ModelFacts, train_digest: str) -> None:
    """48 pairs fit in one block of 64. Each block has its own sum."""
    _set_timings(host, Shape(48, 1.0), Shape(16, 1.0))
    requests = [_advance_arguments(facts, train_digest, _adam(batch_size=size), steps=2) for size in (48, 16, 48)]
    for batched, request in zip(host.advance_batched(requests), requests, strict=True):
        np.testing.assert_allclose(batched.parameters, host.advance(**request).parameters, **BATCH_ROUNDING)
    assert host.batching_statistics().batched == 2 * 2


def test_requests_that_cannot_share_a_batch_are_answered_alone(
    host: Host, facts: ModelFacts, train_digest: str
) -> None:
    """With another NFE, objective or method: the same bits as alone."""
    _set_timings(host, Shape(16, 1.0))
    lm = LevenbergMarquardt(iterations=2, batch_size=16, training_pairs=48)
    requests = [
        _advance_arguments(facts, train_digest, steps=2),
        _advance_arguments(facts, train_digest, nfe=6, steps=2),
        _advance_arguments(facts, train_digest, objective="rmse", steps=2),
        _advance_arguments(facts, train_digest, lm, steps=1),
    ]
    assert host.advance_batched(requests) == [host.advance(**request) for request in requests]
    assert host.batching_statistics().batched == 0


def test_guided_and_unguided_runs_are_batched_separately(
    storage: Storage,
    host_settings: Callable[..., HostSettings],
    facts: ModelFacts,
    specs: dict[PairKey, PairSpec],
) -> None:
    """Guidance belongs to the pair set: runs of two scales may share a call but not a model batch."""
    small = specs[PairKey("validation", 1.0, 0)]
    stores = {
        scale: dataclasses.replace(small, guidance_scale=scale, count=8, batch_size=8, shard_size=8)
        for scale in (1.0, 3.0)
    }
    ensure_pairs(
        storage, list(stores.values()), LocalPool(Host(host_settings(storage))), wait=True, announce=lambda text: None
    )
    host = Host(host_settings(storage))
    _set_timings(host, Shape(8, 1.0), Shape(8, 3.0))
    settings = _adam(batch_size=8, training_pairs=8)
    requests = [_advance_arguments(facts, stores[scale].name, settings, steps=2) for scale in (1.0, 3.0, 3.0, 1.0)]
    for batched, request in zip(host.advance_batched(requests), requests, strict=True):
        np.testing.assert_allclose(batched.parameters, host.advance(**request).parameters, **BATCH_ROUNDING)
    statistics = host.batching_statistics()
    assert (statistics.batched, statistics.batches) == (8, 4)


# ---- when batching pays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("microseconds", "batches"),
    [
        ({1: 52, 2: 40, 4: 30, 8: 21}, [7]),  # falls to the end: one batch of all
        ({1: 52, 2: 30, 4: 29.5}, [2, 2, 2]),  # two fill the device; the seventh runs alone
        ({1: 52, 2: 51, 4: 20}, [7]),  # the small gain at two does not hide the large one at four
        ({1: 52, 2: 60, 4: 51}, []),  # never pays
    ],
)
def test_the_batch_size_is_the_smallest_with_the_least_time_per_sample(
    host: Host, facts: ModelFacts, train_digest: str, microseconds: dict[int, float], batches: list[int]
) -> None:
    """Beyond it the time per sample does not fall, and a larger batch would only take more memory."""
    host.batching_statistics().seconds_per_sample[Shape(16, 1.0)] = microseconds
    host.advance_batched([_advance_arguments(facts, train_digest, _adam(seed=seed), steps=1) for seed in range(7)])
    statistics = host.batching_statistics()
    assert (statistics.batched, statistics.batches) == (sum(batches), len(batches))


def test_each_batch_size_is_timed_once_on_the_network(
    host: Host, facts: ModelFacts, train_digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes 1, 2 and 4 are timed for five runs; the next call of these runs times nothing."""
    timed: list[int] = []
    real = Batching._seconds_per_sample

    def watched(self: Batching, shape: Shape, requests: Any) -> float:
        timed.append(len(requests))
        return real(self, shape, requests)

    monkeypatch.setattr(Batching, "_seconds_per_sample", watched)
    requests = [_advance_arguments(facts, train_digest, _adam(seed=seed), steps=1) for seed in range(5)]
    host.advance_batched(requests)
    host.advance_batched(requests)
    assert timed == [1, 2, 4]
    seconds = host.batching_statistics().seconds_per_sample[Shape(16, 1.0)]
    assert all(0 < value < 1 for value in seconds.values())


def test_batches_that_run_out_of_memory_are_retried_in_smaller_ones(
    host: Host, different_runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step holds all evaluations, the timed call only one. The size that fits is learned once, and counted."""
    _set_timings(host, Shape(16, 1.0))
    real = Batching._answer_batch

    def answer_small(self: Batching, shape: Shape, requests: Any) -> Any:
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, shape, requests)

    monkeypatch.setattr(Batching, "_answer_batch", answer_small)
    for batched, request in zip(host.advance_batched(different_runs), different_runs, strict=True):
        np.testing.assert_allclose(batched.parameters, host.advance(**request).parameters, **BATCH_ROUNDING)
    statistics = host.batching_statistics()
    assert (statistics.out_of_memory, statistics.batches) == (1, 12)


def test_requests_of_a_single_run_are_forwarded_unchanged(host: Host, train_digest: str) -> None:
    """The last run that is left needs neither timing nor the batched path."""
    methods: list[str] = []
    batching = Batching(lambda request: methods.append(request.method), host._select, host.model.field)
    request = Request.of(HostProtocol.loss_and_gradient, theta=np.zeros(19), pairs=train_digest, indices=[0, 1])
    batching.answer([[request, request]])
    assert (methods, batching.statistics.requests) == (["loss_and_gradient"] * 2, 0)


# ---- batch keys ----------------------------------------------------------------------------------------------------


def test_runs_that_can_share_batches_have_equal_keys(facts: ModelFacts, different_runs: list[dict[str, Any]]) -> None:
    """They may differ in family, start, learning rate, seed and sigma0."""
    assert len({request["run"].batch_key(4, 1.0) for request in different_runs}) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"nfe": 6},
        {"guidance_scale": 3.0},
        {"method": _adam(batch_size=8)},
        {"method": LevenbergMarquardt(iterations=2, batch_size=16, training_pairs=48)},
        {"objective": "rmse"},
    ],
)
def test_runs_that_cannot_share_batches_have_different_keys(
    facts: ModelFacts, train_digest: str, changed: dict[str, Any]
) -> None:
    """Such runs would only wait for each other."""
    run = _advance_arguments(facts, train_digest)["run"]
    other = dataclasses.replace(run, **{key: changed[key] for key in ("method", "objective") if key in changed})
    assert other.batch_key(changed.get("nfe", 4), changed.get("guidance_scale", 1.0)) != run.batch_key(4, 1.0)


def test_a_local_pool_never_batches(pool: LocalPool, facts: ModelFacts, train_digest: str) -> None:
    """Without Ray, each run returns the same bits as alone."""
    requests = [_advance_arguments(facts, train_digest, steps=1) for _ in range(2)]
    before = pool.host.batching_statistics().requests  # the host is shared with other tests
    answers = pool.gather(
        [Request.of(HostProtocol.advance, **request).with_batch_key("one key") for request in requests]
    )
    assert answers == [pool.host.advance(**request) for request in requests]
    assert pool.host.batching_statistics().requests == before


def test_by_default_a_sweep_batches_at_most_eight_runs() -> None:
    assert Resources().batch_runs == 8
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Resources(batch_runs=0)
