"""Training data of zoo models: batches of samples with conditioning, split into training and held-out samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.audio.mel import LOUDEST, SILENCE
from orchestrator.datasets.base import LabelledSamples
from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits

Split = Literal["train", "validation"]


class Batch(NamedTuple):
    """A batch of samples with their conditioning.

    Attributes:
        x1: Data, shape (B, \\*shape), float32.
        condition: Conditioning, shape (B, ...), as the network expects it.
    """

    x1: Tensor
    condition: Tensor


class TrainingData(ABC):
    """Samples to train on, and held-out samples for validation.

    Attributes:
        data_range: Largest minus smallest value of the data.
        sizes: Number of samples in each split.
    """

    data_range: float
    sizes: dict[Split, int]

    @abstractmethod
    def batch(self, split: Split, count: int, generator: torch.Generator) -> Batch:
        """Draw ``count`` samples with replacement, on the generator's device."""


class LabelledData(TrainingData):
    """Images with class labels.

    Args:
        reference: The samples, in random order.
        held_out: Share of the samples held out for validation, taken from the front.
        flip: Whether training images are mirrored at random, each with probability 1/2.
        device: Device of the samples.
    """

    def __init__(self, reference: LabelledSamples, held_out: float, flip: bool, device: str):
        samples = torch.from_numpy(reference.samples).to(device)
        labels = torch.from_numpy(reference.labels).to(device)
        self.data_range = float(samples.max() - samples.min())
        self.flip = flip
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


class SpokenStrings(TrainingData):
    """Strings of spoken digits; the held-out strings use other recordings.

    In training, each mask is with probability 1/2 the dataset's own, which hides all but the first digit. Otherwise it
    is a random span, of any length from a third of the frames to all of them.

    Args:
        train, validation: The two sets of recordings.
        device: Device of the batches.
    """

    def __init__(self, train: SpokenDigits, validation: SpokenDigits, device: str):
        self._datasets: dict[Split, SpokenDigits] = {"train": train, "validation": validation}
        self.device = device
        self.sizes = {split: len(dataset.recordings.digits) for split, dataset in self._datasets.items()}
        self.data_range = LOUDEST - SILENCE

    def batch(self, split: Split, count: int, generator: torch.Generator) -> Batch:
        dataset = self._datasets[split]
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        plans = dataset.conditions(seed, range(count))
        if split == "train":
            rng = np.random.default_rng(seed)
            lengths = rng.integers(FRAMES // 3, FRAMES + 1, size=count)
            firsts = rng.integers(0, FRAMES - lengths + 1)
            spans = np.stack([firsts, firsts + lengths], axis=1)
            plans[:, -2:] = np.where(rng.random((count, 1)) < 0.5, spans, plans[:, -2:])
        return Batch(dataset.real(plans).to(self.device), dataset.infilling(plans).to(self.device))
