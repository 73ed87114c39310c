"""Tiny third-party networks with named conditions, and their data; none of them imports this project.

Their weights are random and large enough that state, time and every condition matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

ROWS = 40


def _weights(generator: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator) * shape[0] ** -0.5)


class Core(nn.Module):
    """A smooth function of a flat state, a time and a vector."""

    def __init__(self, size: int, given: int, width: int = 24, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inward, self.outward = _weights(generator, size, width), _weights(generator, width, size)
        self.time, self.given = _weights(generator, 2, width), _weights(generator, given, width)

    def forward(self, x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        time = torch.stack([torch.sin(2 * t), torch.cos(2 * t)], dim=1)
        hidden = x.flatten(1) @ self.inward + time @ self.time + given @ self.given
        return (torch.tanh(hidden) @ self.outward).view_as(x) - 0.3 * x


class Policy(nn.Module):
    """The velocity of a trajectory of 16 positions, given two observations; all-zero observations mean "dropped"."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(32, 10)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        assert obs.shape[1:] == (2, 5)
        return self.core(x, t, 2 * obs.flatten(1))


class Imputer(nn.Module):
    """The velocity of a series of 6 times and 2 channels, some entries of which are given.

    It was trained on the missing entries alone: given ones run off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(12, 24)

    def forward(self, x: Tensor, t: Tensor, values: Tensor, missing: Tensor) -> Tensor:
        assert missing.dtype == torch.bool
        state = torch.where(missing, x, 0.0)
        velocity = self.core(state, t, torch.cat([values.flatten(1), missing.flatten(1).to(x.dtype)], dim=1))
        return torch.where(missing, velocity, 8 * torch.sin(9 * t)[:, None, None] * x)


class Reader(nn.Module):
    """The velocity of a vector of 3, given a list of ids of any length; ids that are not present do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(3, 8)
        self.embedding = nn.Embedding(10, 8)
        with torch.no_grad():
            self.embedding.weight.copy_(_weights(torch.Generator().manual_seed(1), 10, 8) * 8)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, present: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        read = torch.where(present[..., None], self.embedding(ids), 0.0).sum(dim=1)
        return self.core(x, t, read / present.sum(dim=1, keepdim=True))


def policy_data(folder: Path) -> dict[str, Any]:
    """Observations in float64, as numpy makes them, in a .npz file; options of the dataset."""
    random = np.random.default_rng(0)
    np.savez(
        folder / "episodes.npz",
        obs=random.standard_normal((ROWS, 2, 5)),
        actions=random.uniform(-1, 1, (ROWS, 16, 2)).astype(np.float32),
        nothing=np.full((2, 5), 0.5, dtype=np.float64),
    )
    return {"file": str(folder / "episodes.npz"), "shared": ["nothing"], "samples": "actions"}


def imputation_arrays(seed: int = 0) -> dict[str, Any]:
    """Series with gaps: their values, 0 where they are missing, and which entries are missing; for ``function``."""
    random = np.random.default_rng(seed)
    missing = random.random((ROWS, 6, 2)) < 0.5
    missing[:, 0] = True
    series = np.sin(np.arange(6)[:, None] + random.uniform(0, 6, (ROWS, 1, 2))).astype(np.float32)
    return {"values": np.where(missing, 0, series), "missing": torch.from_numpy(missing), "series": series}


def reader_data(folder: Path) -> dict[str, Any]:
    """Lists of one to five ids in a Parquet file; options of the dataset."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 10, random.integers(1, 6)).tolist() for _ in range(ROWS)]
    pq.write_table(pa.table({"ids": ids}), folder / "ids.parquet")
    return {"file": str(folder / "ids.parquet"), "padding": {"ids": 9}, "padding_masks": {"ids": "present"}}
