"""Steps that a whole pair set shares: chosen once, as accurate as the tolerance, and with fewer evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pair_spec_example import pair_spec
from torch import Tensor

from orchestrator.config.pair_plan import PairKey
from orchestrator.errors import StoreError
from orchestrator.hosts.host import Host
from orchestrator.models.zoo import ZooModel
from orchestrator.pairs import PairSpec, PairStore
from orchestrator.pairs.accuracy import PATIENCE, accuracy
from orchestrator.pairs.ground_truth import NotFiniteError, halved, solve, solve_on_steps
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pairs.steps import MOST, SPARE, choose_steps, even_steps
from orchestrator.pairs.tolerance import ERROR_PER_TOLERANCE
from orchestrator.pool.requests import LocalPool
from orchestrator.results.steps import find_steps
from orchestrator.storage import Storage
from solvers.field import CountingField, FunctionField
from solvers.schedulers.cond_ot import CondOT

FREQUENCY = 9.0
ROTATION = FunctionField(lambda x, t: FREQUENCY * torch.stack([-x[:, 1], x[:, 0]], dim=1), CondOT())
X0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
EXACT = torch.tensor([[math.cos(9), math.sin(9)], [-2 * math.sin(9), 2 * math.cos(9)]], dtype=torch.float64)


def _uniform(count: int) -> list[float]:
    return torch.linspace(0, 1, count + 1, dtype=torch.float64).tolist()


def _error(times: Sequence[float]) -> float:
    return float((solve_on_steps(ROTATION, X0, times).x1 - EXACT).square().mean().sqrt())


def _digits(first: int = 0, pairs: int = 4, weights: str = "digits_fm_ot") -> tuple[FunctionField, Tensor]:
    x0 = torch.randn(pairs, 1, 8, 8, generator=torch.Generator().manual_seed(first))
    return ZooModel(weights).field(torch.arange(first, first + pairs) % 10, 1.0), x0


def test_each_step_takes_one_evaluation_and_twice_as_many_give_a_fourth_to_a_sixteenth_of_the_error() -> None:
    """Order 4 inside, order 2 from the Euler step at the beginning."""
    counted = CountingField(ROTATION)
    assert solve_on_steps(counted, X0, _uniform(80)).nfe == counted.nfe == 80
    assert 4 <= _error(_uniform(80)) / _error(halved(_uniform(80))) <= 40


def test_the_field_gets_float32_and_may_change_it_in_place() -> None:
    """Networks are in float32 or less; the state itself is float64."""
    seen: set[torch.dtype] = set()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return x.neg_()

    x1 = solve_on_steps(FunctionField(velocity, CondOT()), X0, _uniform(200)).x1
    assert (seen, x1.dtype) == ({torch.float32}, torch.float64)
    torch.testing.assert_close(x1, X0.double() * math.exp(-1), rtol=1e-4, atol=1e-6)


def test_a_path_holds_every_step_with_its_velocity() -> None:
    """Its last velocity takes one more evaluation, at the end of the domain."""
    solved = solve_on_steps(ROTATION, X0, _uniform(50), keep_path=True)
    assert solved.path is not None
    assert solved.nfe == 51
    assert solved.path.times.tolist() == [_uniform(50)] * 2
    torch.testing.assert_close(solved.path.states[:, -1], solved.x1.float())
    torch.testing.assert_close(solved.path.velocities[:, 7], ROTATION(solved.path.states[:, 7], torch.tensor(0.14)))


def test_steps_of_another_domain_are_refused() -> None:
    """They would end before the data, or evaluate the network outside its domain."""
    with pytest.raises(StoreError, match=r"run from 0 to 0\.9, but the model's path runs from 0 to 1"):
        solve_on_steps(ROTATION, X0, [0.0, 0.5, 0.9])


def test_a_solution_that_is_not_finite_is_an_error() -> None:
    """Too few steps of a stiff field grow without bound."""
    field = FunctionField(lambda x, t: -1e30 * x.sign() * x.abs() ** 1.5, CondOT())
    with pytest.raises(NotFiniteError, match="ground truth is not finite for 2 of 2 samples"):
        solve_on_steps(field, X0 + 1, _uniform(20))


def test_even_steps_share_the_error_out() -> None:
    """Where the velocity bends, at a tenth of the way, steps are shortest; a step more or less changes little."""
    bend = FunctionField(lambda x, t: x * torch.tanh((t - 0.1) / 0.01), CondOT())
    truth = solve(bend, X0 + 1, 1e-6, 1e-6, keep_errors=True)
    assert truth.errors is not None
    steps = even_steps(truth.errors, (0.0, 1.0), 40)
    lengths = torch.tensor(steps).diff()
    assert (steps[0], steps[-1], len(steps)) == (0.0, 1.0, 41)
    assert steps[int(lengths.argmin())] == pytest.approx(0.1, abs=0.03)
    assert lengths.max() > 4 * lengths.min()


def test_errors_are_those_of_the_steps() -> None:
    """dopri5 accepts a step if its estimated error, relative to 1 + |x|, is within the tolerance."""
    truth = solve(ROTATION, X0, 1e-6, 1e-6, keep_path=True, keep_errors=True)
    assert truth.path is not None
    assert truth.errors is not None
    assert [end for end, _ in truth.errors] == pytest.approx(truth.path.times[0, 1:].tolist(), abs=1e-12)
    assert 1e-8 < max(error for _, error in truth.errors) <= 1e-6
    assert solve(ROTATION, X0, 1e-6, 1e-6).errors is None


@pytest.mark.parametrize("weights", ["digits_fm_ot", "digits_fm_v_cs", "digits_eps_vp"])
def test_chosen_steps_are_as_accurate_as_the_tolerance_for_other_pairs_too(weights: str) -> None:
    """The geometric mean of their errors is at most that of which a first tolerance is computed; they take far fewer
    evaluations than dopri5, and the choice costs what is counted."""
    counted = CountingField(_digits(weights=weights)[0])
    chosen = choose_steps(counted, _digits()[1], 1e-4, 1e-4)
    assert chosen.steps is not None
    assert chosen.error is not None
    assert chosen.error <= SPARE * ERROR_PER_TOLERANCE * 1e-4
    assert chosen.evaluations == 4 * counted.nfe
    field, x0 = _digits(4, 16, weights)
    adaptive, exact = solve(field, x0, 1e-4, 1e-4), solve(field, x0, 1e-6, 1e-6).x1
    error = (solve_on_steps(field, x0, chosen.steps).x1 - exact).flatten(1).square().mean(1).sqrt()
    assert float(error.log().mean().exp()) <= ERROR_PER_TOLERANCE * 1e-4
    assert len(chosen.steps) - 1 < 0.75 * adaptive.nfe


def test_adaptive_steps_are_kept_if_they_take_fewer_evaluations() -> None:
    """A kink makes a high order useless: rejected steps cost less than short ones everywhere."""
    kink = FunctionField(lambda x, t: x * torch.where((1000 * t).floor() % 2 == 0, 1.0, -1.0), CondOT())
    counted = CountingField(kink)
    chosen = choose_steps(counted, X0, 1e-5, 1e-5)
    assert (chosen.steps, chosen.error) == (None, None)
    assert chosen.evaluations == 2 * counted.nfe
    assert MOST < 1


def test_the_error_of_pairs_on_given_steps_is_measured_on_half_of_each() -> None:
    """To a fifth of the error: half steps have an error too."""
    steps = _uniform(100)
    x1 = solve_on_steps(ROTATION, X0, steps).x1
    counted = CountingField(ROTATION)
    measured = accuracy(counted, X0, x1, 1e-4, 1e-4, limit=PATIENCE * 100, steps=steps)
    assert measured.rms == pytest.approx((x1 - EXACT).square().mean(dim=1).sqrt().tolist(), rel=0.3)
    assert measured.evaluations == 2 * counted.nfe == 2 * 200


def test_the_steps_of_a_spec_are_part_of_its_identity() -> None:
    """Without steps, the digest is that of earlier versions."""
    spec = pair_spec(steps=(0.0, 0.25, 1.0))
    assert len({pair_spec().digest, spec.digest, pair_spec(steps=(0.0, 0.5, 1.0)).digest}) == 3
    assert "steps" not in pair_spec().identity
    assert PairSpec.from_dict(spec.to_dict(), spec.count) == spec


@pytest.mark.parametrize("steps", [[], [0.0], [0.0, 0.0, 1.0], [1.0, 0.0], ["a", "b"], 3])
def test_steps_that_are_none_are_refused_in_a_manifest(steps: object) -> None:
    """A manifest may be damaged."""
    with pytest.raises((ValueError, TypeError)):
        PairSpec.from_dict(pair_spec().to_dict() | {"steps": steps}, 40)


@pytest.fixture
def small(specs: dict[PairKey, PairSpec]) -> PairSpec:
    """Pairs in batches and files of eight."""
    return replace(specs["train", 1.0, 0], batch_size=8, shard_size=8, count=8)


@pytest.mark.parametrize("shared", [False, True])
def test_a_set_that_grows_by_batches_keeps_its_bytes_and_solves_nothing_twice(
    shared: bool, pool: LocalPool, small: PairSpec, storage: Storage
) -> None:
    """8, 16, 32: pair i is the same in whatever order batches are made, and each batch is solved once."""
    host = Host(replace(pool.host.settings, storage=str(storage.root)))
    own = LocalPool(host)
    if shared:
        small = find_steps(storage, own, small).of(small)
        assert small.steps is not None
    whole = Storage.at(f"{storage.root}/whole")
    contents: list[dict[str, bytes]] = []
    for count in (8, 16, 32):
        spec = replace(small, count=count)
        before = host.work.pairs
        ensure_pairs(storage, [spec], own, wait=False, announce=lambda note: None)
        assert host.work.pairs - before == (8 if count < 32 else 16)
        store = PairStore(storage, spec)
        contents.append({name: storage.read(f"{store.folder}/{name}") for name in storage.names(store.folder)})
        if contents[1:]:
            files = {name: data for name, data in contents[-2].items() if name.endswith(".parquet")}
            assert files.items() <= contents[-1].items()
    at_once = LocalPool(Host(replace(pool.host.settings, storage=str(whole.root))))
    spec = replace(small, count=32)
    ensure_pairs(whole, [spec], at_once, wait=False, announce=lambda note: None)
    grown, made = PairStore(storage, spec).load(), PairStore(whole, spec).load()
    assert torch.equal(grown.x1, made.x1)
    assert torch.equal(grown.nfe, made.nfe)
    assert PairStore(storage, spec).evaluations() == int(grown.nfe.sum())


def test_steps_are_chosen_once_and_kept(pool: LocalPool, small: PairSpec, storage: Storage) -> None:
    """A command that is started again finds the same pairs, and pays for nothing twice."""
    own = LocalPool(Host(replace(pool.host.settings, storage=str(storage.root))))
    first = find_steps(storage, own, small)
    before = own.host.work.forwards
    again = find_steps(storage, own, small)
    assert (again.chosen, again.reused, first.reused) == (first.chosen, True, False)
    assert own.host.work.forwards == before
    assert again.of(small).digest == first.of(small).digest != small.digest


def test_facts_of_pairs_on_given_steps_have_their_accuracy(pool: LocalPool, small: PairSpec, storage: Storage) -> None:
    """At 1e-4, the shipped digits are at 65 dB or better (``ERROR_PER_TOLERANCE``)."""
    own = LocalPool(Host(replace(pool.host.settings, storage=str(storage.root))))
    spec = find_steps(storage, own, small).of(small)
    ensure_pairs(storage, [spec], own, wait=False, announce=lambda note: None)
    facts = own.host.truth(spec.name, 4)
    assert facts.accuracy_db is not None
    assert facts.accuracy_db > 20 * math.log10(2 / (ERROR_PER_TOLERANCE * 1e-4))
    assert facts.evaluations == 4 * 2 * facts.nfe
