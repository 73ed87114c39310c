"""Velocity fields by pair, for methods that split, reorder or repeat the pairs of a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from solvers.field import VelocityField

PairField = Callable[[Tensor], VelocityField]
"""``pair_field(rows)``: the velocity field for a batch of these rows of the current pairs, (b,) int64 on the CPU, in
this order; rows may repeat. A conditional model returns a field with the conditioning ``condition[rows]``."""


def unconditional(field: VelocityField) -> PairField:
    """The :data:`PairField` of a field that is the same for every pair."""
    return lambda rows: field
