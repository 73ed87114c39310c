"""Conditioning on class labels."""

from __future__ import annotations

import torch
from torch import Tensor


class LabelConditioned:
    """Part of a network whose conditioning is a label, int64, shape (B,); label ``classes`` means "dropped".

    Attributes:
        conditioning: The dataset plugin that draws such conditioning.
        classes: Number of labels.
    """

    conditioning = "labels"
    classes: int

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.classes)

    def condition_error(self, condition: Tensor) -> str | None:
        """What is wrong with some conditioning, or None."""
        if condition.ndim != 1 or condition.is_floating_point():
            return f"conditioning of shape {tuple(condition.shape)} and {condition.dtype}, the model takes class labels"
        unknown = condition[(condition < 0) | (condition >= self.classes)]
        if len(unknown):
            return (
                f"label {int(unknown[0])} is none of its {self.classes} classes; set conditioning.options.classes to "
                f"{self.classes}"
            )
        return None
