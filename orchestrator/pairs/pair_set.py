"""Ground-truth pairs in memory, optionally with the trajectories from x0 to x1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.pairs import conditions
from orchestrator.pairs.conditions import Condition
from solvers.losses import counted
from solvers.trajectory import DensePath


@dataclass(frozen=True)
class PairSet:
    """N ground-truth pairs.

    Attributes:
        x0: Noise, (N, ...), float32.
        x1: Ground truth, (N, ...), float32.
        condition: Conditioning, (N, ...): int64, or float32 if the adapter encodes it (texts), as stored; or the named
            tensors that stored row numbers stand for.
        nfe: Velocity evaluations that the ground truth took, (N,), int32.
        path: The trajectories from x0 to x1, with the adaptive solver's steps as knots; None if they were not kept.
        mask: Entries of a sample that count in losses and metrics, bool, (N, ...) broadcastable to x1; None: all. It is
            the dataset's, and not stored.
    """

    x0: Tensor
    x1: Tensor
    condition: Condition
    nfe: Tensor
    path: DensePath | None = None
    mask: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """The conditioning, if it is as stored: not named tensors."""
        assert isinstance(self.condition, Tensor), "named conditions are stored as row numbers"
        return self.condition

    def __len__(self) -> int:
        return self.x0.shape[0]

    def counted(self, x: Tensor) -> Tensor:
        """``x``, (..., N, \\*sample), restricted to the entries that count, see :func:`solvers.losses.counted`."""
        return counted(x, self.mask)

    def filled(self, samples: Tensor) -> Tensor:
        """Samples in which the entries that do not count are those of ground truth."""
        return samples if self.mask is None else torch.where(self.mask, samples, self.x1)

    def select(self, indices: Sequence[int] | slice) -> PairSet:
        chosen = indices if isinstance(indices, slice) else torch.as_tensor(indices)
        return self._with(lambda column: column[chosen], lambda times: times[chosen])

    def to(self, device: str) -> PairSet:
        # A path's times stay on the CPU, like all scalars of a solver.
        return self._with(lambda column: column.to(device), lambda times: times)

    def _with(self, change: Callable[[Any], Any], change_times: Callable[[Tensor], Tensor]) -> PairSet:
        path = self.path
        if path is not None:
            path = DensePath(change_times(path.times), change(path.states), change(path.velocities))
        mask = None if self.mask is None else change(self.mask)
        return PairSet(change(self.x0), change(self.x1), change(self.condition), change(self.nfe), path, mask)


def concatenate(parts: Sequence[PairSet]) -> PairSet:
    """One set of all parts, in order. It has trajectories only if every part has them."""
    paths = [part.path for part in parts if part.path is not None]
    masks = [part.mask for part in parts if part.mask is not None]
    assert len(masks) in (0, len(parts)), "pairs with a mask and pairs without cannot share a batch"
    return PairSet(
        x0=torch.cat([part.x0 for part in parts]),
        x1=torch.cat([part.x1 for part in parts]),
        condition=conditions.concatenate([part.condition for part in parts]),
        nfe=torch.cat([part.nfe for part in parts]),
        path=_joined(paths) if len(paths) == len(parts) else None,
        mask=torch.cat(masks) if masks else None,
    )


def _joined(paths: Sequence[DensePath]) -> DensePath:
    """Concatenate paths. Their numbers of knots differ: shorter paths are padded by repeating their last knot."""
    knots = max(path.times.shape[1] for path in paths)

    def padded(values: Tensor) -> Tensor:
        missing = knots - values.shape[1]
        return torch.cat([values, values[:, -1:].expand(-1, missing, *values.shape[2:])], dim=1) if missing else values

    return DensePath(
        torch.cat([padded(path.times) for path in paths]),
        torch.cat([padded(path.states) for path in paths]),
        torch.cat([padded(path.velocities) for path in paths]),
    )
