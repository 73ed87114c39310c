"""Mixin for conditioning on class labels."""

from __future__ import annotations

import torch
from torch import Tensor


class LabelConditioned:
    """Mixin for networks conditioned on a label, int64, shape (B,); label ``classes`` means "dropped".

    Attributes:
        conditioning: Name of the dataset plugin that draws such conditioning.
        classes: Number of labels.
    """

    conditioning = "labels"
    classes: int

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.classes)

    def condition_error(self, condition: Tensor) -> str | None:
        """Describe the problem with invalid conditioning; None if it is valid."""
        if condition.ndim != 1 or condition.is_floating_point():
            return (
                f"conditioning is {condition.dtype} of shape {tuple(condition.shape)}, but the model takes class labels"
            )
        unknown = condition[(condition < 0) | (condition >= self.classes)]
        if len(unknown):
            return (
                f"label {int(unknown[0])} is not one of its {self.classes} classes; set conditioning.options.classes "
                f"to {self.classes}"
            )
        return None
