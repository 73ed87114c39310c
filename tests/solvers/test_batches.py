"""The training pairs that each iteration draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.distil.batches import BatchSizes, batch_indices


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pairs=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 10), epoch=st.integers(0, 3))
def test_an_epoch_draws_no_pair_twice(pairs: int, batch_size: int, seed: int, epoch: int) -> None:
    """The batches of an epoch are full and disjoint; only an incomplete last batch is dropped."""
    size = min(batch_size, pairs)
    per_epoch = pairs // size
    batches = [batch_indices(pairs, batch_size, seed, epoch * per_epoch + k) for k in range(per_epoch)]
    drawn = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [size] * per_epoch
    assert len(set(drawn)) == len(drawn) == per_epoch * size
    assert set(drawn) <= set(range(pairs))


def test_a_batch_depends_only_on_its_seed_and_iteration() -> None:
    """A resumed run draws the same batches: nothing is stored, and global random state is neither read nor changed."""
    torch.manual_seed(1)
    expected_noise = torch.rand(3)
    torch.manual_seed(1)
    first = batch_indices(100, 10, seed=3, iteration=17)
    assert torch.equal(torch.rand(3), expected_noise)
    batch_indices(100, 10, seed=3, iteration=5)
    torch.manual_seed(2)
    assert batch_indices(100, 10, seed=3, iteration=17) == first


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    epochs = [batch_indices(100, 100, seed=0, iteration=k) for k in range(3)]
    seeds = [batch_indices(100, 100, seed=k, iteration=0) for k in range(1, 3)]
    orders = {tuple(order) for order in [*epochs, *seeds]}
    assert len(orders) == 5


@pytest.mark.parametrize("batch_size", [5, 40])
def test_a_batch_larger_than_the_training_set_is_the_training_set(batch_size: int) -> None:
    assert sorted(batch_indices(5, batch_size, seed=0, iteration=9)) == [0, 1, 2, 3, 4]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    pairs=st.integers(1, 60),
    first=st.integers(1, 8),
    largest=st.integers(8, 40),
    growth=st.floats(1.0, 2.0),
    seed=st.integers(0, 10),
)
def test_growing_batches_draw_no_pair_twice_before_the_epoch_ends(
    pairs: int, first: int, largest: int, growth: float, seed: int
) -> None:
    """A batch is disjoint from all before it while these fit into the training set, and it never repeats a pair."""
    sizes = BatchSizes(first, largest, growth)
    seen: set[int] = set()
    for iteration in range(20):
        batch = batch_indices(pairs, sizes, seed, iteration)
        assert len(batch) == len(set(batch)) == min(round(first * growth**iteration), largest, pairs)
        if len(seen) + len(batch) > pairs:
            seen = set()
        assert not seen & set(batch)
        seen |= set(batch)


def test_batches_that_do_not_grow_are_those_of_a_constant_size() -> None:
    for iteration in range(12):
        assert batch_indices(50, BatchSizes(12, 12), 4, iteration) == batch_indices(50, 12, 4, iteration)
