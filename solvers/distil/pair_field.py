"""Which velocity field belongs to which pairs: what a method needs that rearranges the batch it is given."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from solvers.field import VelocityField

PairField = Callable[[Tensor], VelocityField]
"""``pair_field(rows)``: the velocity field of a batch made of these rows of the pairs at hand, (b,) int64 on the CPU,
in this order; rows may repeat. A conditional model answers with a field whose conditioning is ``condition[rows]``."""


def unconditional(field: VelocityField) -> PairField:
    """A field that is the same for every pair."""
    return lambda rows: field
