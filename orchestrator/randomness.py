"""Counter-based random numbers: the draw of pair i is a function of (seed, i) and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Streams that must not overlap get counters of their own.
_STREAMS = {"noise": 0, "condition": 1}


def generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """A generator for one pair and one purpose (Philox, keyed by seed and index)."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, _STREAMS[stream]]))


def noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """x0 ~ N(0, I) of these pairs, float32, shape (len(indices), \\*shape)."""
    return np.stack([generator(seed, i, "noise").standard_normal(shape, dtype=np.float32) for i in indices])
