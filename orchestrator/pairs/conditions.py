"""Named conditions of a batch: several tensors, such as an observation and its mask, that share their first axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Conditions:
    """Named tensors of B samples, shape (B, ...) each, of any dtype. Indexing selects samples.

    Args:
        tensors: At least one tensor, by name.

    Raises:
        ValueError: There is no tensor, or their lengths differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        lengths = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) != 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no tensor"
            raise ValueError(f"conditions must be tensors of one length, got {shown}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditions:
        return Conditions({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: str | torch.device) -> Conditions:
        return Conditions({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def clone(self) -> Conditions:
        return Conditions({name: tensor.clone() for name, tensor in self.tensors.items()})

    def replaced(self, tensors: Mapping[str, Tensor]) -> Conditions:
        """A copy in which these tensors take the place of those of the same names."""
        return Conditions(self.tensors | dict(tensors))

    def joined(self, other: Conditions) -> Conditions:
        """These conditions, followed by others of the same names.

        Raises:
            ValueError: The names differ.
        """
        if set(self.names) != set(other.names):
            raise ValueError(f"conditions {', '.join(self.names)} and {', '.join(other.names)} cannot share a batch")
        return Conditions({name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()})


Condition = Tensor | Conditions
"""What a network is conditioned on: one tensor of shape (B, ...), such as labels, or several by name."""


def concatenate(parts: Sequence[Condition]) -> Condition:
    """The conditions of all parts, in order.

    Raises:
        ValueError: Some are named and others are not, or their names differ.
    """
    unnamed = [part for part in parts if isinstance(part, Tensor)]
    named = [part for part in parts if isinstance(part, Conditions)]
    if not named:
        return torch.cat(unnamed)
    if unnamed:
        raise ValueError("conditions with names and conditions without cannot share a batch")
    return functools.reduce(Conditions.joined, named)
