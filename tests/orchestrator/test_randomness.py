"""The random draw of pair i is a function of (seed, i) only."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from orchestrator.randomness import generator, noise

SHAPE = (1, 8, 8)


def test_noise_of_a_pair_does_not_depend_on_its_batch() -> None:
    """A pair is the same in any order, batch or process."""
    indices = [5, 0, 3, 1_000_000, 4]
    batched = noise(11, indices, SHAPE)
    assert batched.dtype == np.float32
    assert batched.shape == (5, *SHAPE)
    np.testing.assert_array_equal(batched, np.concatenate([noise(11, [i], SHAPE) for i in indices]))
    np.testing.assert_array_equal(batched[::-1], noise(11, indices[::-1], SHAPE))


def test_noise_has_its_recorded_values() -> None:
    """NumPy does not guarantee its streams across versions: a change must not silently mix stores."""
    digest = hashlib.sha256(noise(0, [0, 1, 2**40], SHAPE).tobytes()).hexdigest()
    assert digest == "13039abb5abe14155ba2c9bc59aa37bafef47b67f4937000d8329ed21bbe13bb"
    np.testing.assert_allclose(
        noise(1234, [7], (2, 2)).ravel(), [-0.8370973, -1.0867337, 0.21243829, 0.11113691], rtol=1e-6
    )
    assert [int(generator(0, i, "condition").integers(10)) for i in range(10)] == [7, 8, 4, 5, 1, 9, 0, 9, 1, 9]


def test_different_seeds_and_indices_have_different_noise() -> None:
    """No pair belongs to two sets."""
    draws = {noise(seed, [index], SHAPE).tobytes() for seed in range(20) for index in range(20)}
    assert len(draws) == 400


def test_conditioning_has_a_random_stream_of_its_own() -> None:
    """With a shared stream, the label of a pair would be a function of its noise."""
    for index in range(50):
        first = generator(0, index, "noise").integers(2**63, size=64)
        second = generator(0, index, "condition").integers(2**63, size=64)
        assert not set(first.tolist()) & set(second.tolist())


def test_an_unknown_purpose_is_refused() -> None:
    """The stream of a purpose that is not listed could overlap a listed one."""
    with pytest.raises(KeyError):
        generator(0, 0, "anything")


def test_noise_is_standard_normal() -> None:
    """x0 ~ N(0, I): mean 0, variance 1 and no correlation between pairs, each within five standard errors."""
    draws = noise(3, range(2000), SHAPE).reshape(2000, -1).astype(np.float64)
    assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 5 * np.sqrt(2 / draws.size)
    correlation = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(draws.size)
