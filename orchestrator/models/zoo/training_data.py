"""What a zoo model is trained on: batches of samples and their conditioning, some of them held out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from orchestrator.datasets.base import LabelledSamples

Split = Literal["train", "validation"]


class Batch(NamedTuple):
    """Samples with what they are conditioned on.

    Attributes:
        x1: Data, shape (B, \\*shape), float32.
        condition: Shape (B, ...), as the network takes it.
        weight: Where the loss counts, broadcast to ``x1``; None: everywhere.
    """

    x1: Tensor
    condition: Tensor
    weight: Tensor | None = None


class TrainingData(ABC):
    """Samples to train on, and a share that is held out.

    Attributes:
        data_range: Largest minus smallest value of the data.
        sizes: Number of samples in each split.
    """

    data_range: float
    sizes: dict[Split, int]

    @abstractmethod
    def batch(self, split: Split, count: int, generator: torch.Generator) -> Batch:
        """``count`` samples drawn with replacement, on the generator's device."""

    @abstractmethod
    def dropped(self, condition: Tensor, drop: Tensor) -> Tensor:
        """The conditioning with that of the samples marked in ``drop``, shape (B,), taken away."""


class LabelledData(TrainingData):
    """Images of classes.

    Args:
        reference: The samples, in random order.
        classes: Number of classes; label ``classes`` means "dropped".
        held_out: Share of the samples that validate, the first ones.
        flip: Mirror every second training image.
        device: Where the samples are kept.
    """

    def __init__(self, reference: LabelledSamples, classes: int, held_out: float, flip: bool, device: str):
        samples = torch.from_numpy(reference.samples).to(device)
        labels = torch.from_numpy(reference.labels).to(device)
        self.data_range = float(samples.max() - samples.min())
        self.classes, self.flip = classes, flip
        count = max(1, round(held_out * len(labels)))
        self._splits: dict[Split, tuple[Tensor, Tensor]] = {
            "train": (samples[count:], labels[count:]),
            "validation": (samples[:count], labels[:count]),
        }
        self.sizes = {split: len(part) for split, (_, part) in self._splits.items()}

    def batch(self, split: Split, count: int, generator: torch.Generator) -> Batch:
        samples, labels = self._splits[split]
        chosen = torch.randint(len(labels), (count,), generator=generator, device=generator.device)
        x1 = samples[chosen]
        if self.flip and split == "train":
            mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
            x1 = torch.where(mirrored.view(-1, 1, 1, 1), x1.flip(-1), x1)
        return Batch(x1, labels[chosen])

    def dropped(self, condition: Tensor, drop: Tensor) -> Tensor:
        return torch.where(drop, self.classes, condition)
