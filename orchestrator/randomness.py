"""Counter-based random numbers: the draw of pair i depends only on (seed, i)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Each stream has its own counter, so that streams do not overlap.
_STREAMS = {"noise": 0, "condition": 1}


def generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """A Philox generator for one pair and one stream, keyed by seed and index."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, _STREAMS[stream]]))


def noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Noise x0 ~ N(0, I) of the pairs ``indices``, float32, shape (len(indices), \\*shape)."""
    return np.stack([generator(seed, i, "noise").standard_normal(shape, dtype=np.float32) for i in indices])
