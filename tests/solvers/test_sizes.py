"""Sizes of a distillation follow from the size of theta and of a sample."""

from __future__ import annotations

import itertools

import pytest

from solvers.distil.sizes import LARGEST_TRAIN, MULTIPLE, sizes


@pytest.mark.parametrize(("numbers", "dimensions", "nfe"), [(1, 1, 1), (51, 64, 8), (51, 256, 8), (249, 2, 20)])
def test_sizes_determine_theta_and_come_in_whole_batches(numbers, dimensions, nfe):
    chosen = sizes(numbers, dimensions, nfe)
    assert chosen.train % MULTIPLE == 0
    assert chosen.train == LARGEST_TRAIN or chosen.train * dimensions >= numbers
    assert 1 <= chosen.first_batch < chosen.largest_batch
    assert chosen.batch_growth > 1


def test_large_samples_need_few_pairs():
    assert sizes(51, 10**6, 8).train < sizes(51, 64, 8).train < sizes(167, 64, 16).train
    assert sizes(51, 10**6, 8).first_batch < sizes(51, 64, 8).first_batch < sizes(167, 64, 16).first_batch


def test_training_pairs_double_up_to_a_limit():
    chosen = sizes(51, 256, 8)
    train = [chosen.train]
    while (following := chosen.more_train(train[-1])) is not None:
        train.append(following)
    assert train[-1] == LARGEST_TRAIN
    assert all(b == 2 * a for a, b in itertools.pairwise(train))


@pytest.mark.parametrize("bad", [(0, 64, 8), (51, 0, 8), (51, 64, 0)])
def test_sizes_refuse_nothing_to_learn(bad):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        sizes(*bad)
