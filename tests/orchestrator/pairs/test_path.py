"""Trajectories stored with the pairs: the adaptive solver's own steps, their storage, and their accuracy."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.config.pair_plan import PairKey
from orchestrator.config.reading import load_config
from orchestrator.errors import DamagedShardError
from orchestrator.hosts.truth import solve_pairs
from orchestrator.pairs import PairSet, PairSpec, PairStore, concatenate
from orchestrator.pairs.ground_truth import solve
from orchestrator.pool.requests import LocalPool
from orchestrator.randomness import noise
from orchestrator.storage import Storage
from solvers.field import VelocityField
from solvers.trajectory import DensePath

TRAIN = PairKey("train", 1.0, 0)


@pytest.fixture
def spec(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """The small experiment's training pairs, with their trajectories."""
    return dataclasses.replace(specs[TRAIN], trajectory=True)


def _as_solved(spec: PairSpec, batch: range) -> PairSpec:
    """The spec with a separate tolerance per batch, so that batches take different numbers of steps."""
    tolerance = 10.0 ** -(4 + batch.start // spec.batch_size)
    return dataclasses.replace(spec, rtol=tolerance, atol=tolerance)


@pytest.fixture
def store(storage: Storage, spec: PairSpec, pool: LocalPool) -> PairStore:
    """A store of two shards, each of two batches of eight, made by the host."""
    host = pool.host
    small = dataclasses.replace(spec, count=32)
    store = PairStore(storage, small)
    records = []
    for indices in small.gaps([]):
        parts = [
            solve_pairs(_as_solved(small, batch), batch, host.model, host._field, "cpu")
            for batch in small.batches(indices)
        ]
        records.append(store.write_shard(indices.start, concatenate(parts)))
    store.commit(records)
    return store


def test_a_path_leads_from_the_noise_to_the_ground_truth(store: PairStore) -> None:
    """The pair holds the ends of the same solution in float32."""
    pairs = store.load()
    assert pairs.path is not None
    torch.testing.assert_close(pairs.path.state(0.0), pairs.x0)
    torch.testing.assert_close(pairs.path.state(1.0), pairs.x1, rtol=0, atol=1e-6)


def test_the_store_returns_the_knots_of_every_batch(store: PairStore, pool: LocalPool) -> None:
    """Batches took different numbers of steps. Each row has its own knots, padded with its last one."""
    pairs = store.load()
    assert pairs.path is not None
    spec, steps = store.spec, set()
    for batch in spec.batches(range(spec.count)):
        chosen = pairs.select(list(batch))
        field = pool.host.model.field(chosen.condition, spec.guidance_scale)
        tolerance = _as_solved(spec, batch).rtol
        solved = solve(field, chosen.x0, tolerance, tolerance, keep_path=True).path
        assert solved is not None
        assert chosen.path is not None
        knots = solved.times.shape[1]
        steps.add(knots)
        torch.testing.assert_close(chosen.path.times[:, :knots], solved.times, rtol=0, atol=0)
        torch.testing.assert_close(chosen.path.states[:, :knots], solved.states, rtol=0, atol=0)
        torch.testing.assert_close(chosen.path.velocities[:, :knots], solved.velocities, rtol=0, atol=0)
        assert (chosen.path.times[:, knots:] == 1).all()
    assert len(steps) == 4


def test_keeping_the_path_costs_no_evaluation_and_changes_no_pair(store: PairStore, pool: LocalPool) -> None:
    """The last stage of a step is the velocity at its end, so the knots are by-products."""
    pairs = store.load().select(range(8))
    field = pool.host.model.field(pairs.condition, 1.0)
    plain = solve(field, pairs.x0, 1e-6, 1e-6)
    watched = solve(field, pairs.x0, 1e-6, 1e-6, keep_path=True)
    assert torch.equal(plain.x1, watched.x1)
    assert plain.nfe == watched.nfe
    assert plain.path is None


def test_a_shard_whose_path_does_not_belong_to_its_rows_is_damaged(store: PairStore) -> None:
    """Lists of the wrong length are reported as damage, instead of an index error during a distillation."""
    pairs = store.load().select(slice(0, 16))
    assert pairs.path is not None
    cut = DensePath(pairs.path.times, pairs.path.states[..., :4], pairs.path.velocities[..., :4])
    store.write_shard(0, dataclasses.replace(pairs, path=cut))
    with pytest.raises(DamagedShardError, match="trajectory columns differ in length"):
        store._parse(range(16), store.storage.read(store.shard_key(range(16))))


def _exact(field: VelocityField, x0: Tensor, times: Tensor) -> Tensor:
    """The states at these times, solved about a thousand times more accurately than the path."""
    states = [x0.double()]
    for first, last in pairwise(times.tolist()):
        steps = torch.linspace(first, last, 41, dtype=torch.float64)
        x = states[-1]
        for t, t_next in pairwise(steps):
            h = t_next - t
            k1 = field(x, t)
            k2 = field(x + h / 2 * k1, t + h / 2)
            k3 = field(x + h / 2 * k2, t + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3, t_next))
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("steps", [4, 8])
def test_interpolation_errors_are_far_below_the_errors_they_measure(steps: int) -> None:
    """At the shipped configuration's tolerance, they are under 1 % of the local errors of midpoint steps."""
    pairs = load_config("sweeps/configs/digits.yaml").pairs
    model = plugins.build("models", "zoo", {"weights": "digits_fm_ot"})
    field = model.field(torch.from_numpy(plugins.build("datasets", "labels").conditions(0, range(8))), 1.0)
    x0 = torch.from_numpy(noise(0, range(8), model.shape))
    path = solve(field, x0, pairs.rtol, pairs.atol, keep_path=True).path
    assert path is not None
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        exact = _exact(field, x0, times)
        local = []
        for i in range(steps):
            h = times[i + 1] - times[i]
            middle = exact[i] + h / 2 * field(exact[i], times[i])
            local.append(exact[i] + h * field(middle, times[i] + h / 2) - exact[i + 1])
    interpolation = (path.state(times[1:]) - exact[1:]).flatten(2).square().mean(-1).sqrt().mean()
    assert interpolation < 0.01 * torch.stack(local).flatten(2).square().mean(-1).sqrt().mean()


def test_joining_pairs_with_and_without_a_path_drops_the_path(store: PairStore) -> None:
    """The joined set keeps only the columns that every row has."""
    pairs = store.load()
    joined = concatenate([pairs, PairSet(pairs.x0, pairs.x1, pairs.condition, pairs.nfe)])
    assert (len(joined), joined.path) == (64, None)
