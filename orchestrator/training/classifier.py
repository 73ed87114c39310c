"""Trains the classifiers whose hidden layers are features, and computes their reference statistics.

``python -m orchestrator.training.classifier digits_cnn`` takes seconds on one core, and
``... cifar10_gray16_cnn FOLDER``, with the CIFAR-10 files in FOLDER, takes a quarter of an hour. Run it by hand when a
network changes, and commit the two files it writes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orchestrator import plugins
from orchestrator.datasets.base import LabelledSamples
from orchestrator.datasets.cifar10 import Cifar10
from orchestrator.datasets.digits import Digits
from orchestrator.features._classifier import METADATA_KEY
from orchestrator.features.moments import WEIGHTS, feature_moments
from orchestrator.storage import Storage
from orchestrator.training.fitting import fit
from orchestrator.weights.shipped import ship

DIGITS_HELD_OUT = 360
KEPT = 4000
"""Real samples whose features are shipped with the package, for kernel distances."""


class Labelled(NamedTuple):
    """Samples (N, C, H, W) in [-1, 1], float32, and labels (N,), int64."""

    samples: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Recipe:
    """Training recipe of a classifier.

    Attributes:
        epochs: Passes over the training samples.
        batch: Samples per batch.
        learning_rate: Peak of the one-cycle schedule.
        reach: Largest random shift of the samples, in pixels.
        paper: Value that fills the edges of shifted samples.
        flip: Whether batches are mirrored at random, each with probability 1/2.
        reference: Name of the reference set in the statistics' file name, and its description inside the file.
    """

    epochs: int
    batch: int
    learning_rate: float
    reach: int
    paper: float
    flip: bool
    reference: tuple[str, str]


RECIPES = {
    "digits_cnn": Recipe(60, 64, 3e-3, 1, -1.0, False, ("digits", "digits, all 1,797 of scikit-learn")),
    "cifar10_gray16_cnn": Recipe(
        14, 128, 4e-3, 2, 0.0, True, ("cifar10_gray16", "CIFAR-10, 50,000 training images, grey, 16x16")
    ),
}


def split_digits(seed: int = 0) -> tuple[Labelled, Labelled]:
    """Training and test digits, from a fixed permutation whose first :data:`DIGITS_HELD_OUT` are held out."""
    digits = _tensors(Digits().reference())
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(seed))
    samples, labels = digits.samples[order], digits.labels[order]
    test, train = slice(None, DIGITS_HELD_OUT), slice(DIGITS_HELD_OUT, None)
    return Labelled(samples[train], labels[train]), Labelled(samples[test], labels[test])


def split_photos(folder: str) -> tuple[Labelled, Labelled]:
    """Training and test images of CIFAR-10, grey, 16x16, from the files in ``folder``."""
    train, test = (Cifar10(folder, split, 16, True).reference() for split in ("train", "test"))  # type: ignore[arg-type]
    return _tensors(train), _tensors(test)


def _tensors(reference: LabelledSamples) -> Labelled:
    return Labelled(torch.from_numpy(reference.samples), torch.from_numpy(reference.labels))


def train(make: Callable[[], nn.Module], data: Labelled, recipe: Recipe, seed: int = 0) -> nn.Module:
    """Train a classifier by AdamW with a one-cycle learning rate, on shifted and mirrored samples.

    Args:
        make: Builds the untrained network.
        data: Training samples.
        recipe: The recipe.
        seed: Seed of weights, batches, shifts and mirroring.
    """
    torch.manual_seed(seed)
    net = make().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(data.labels), (recipe.batch,), generator=generator)
        shift = torch.randint(-recipe.reach, recipe.reach + 1, (2,), generator=generator).tolist()
        samples = shifted(data.samples[chosen], shift, recipe.paper)
        if recipe.flip and bool(torch.rand((), generator=generator) < 0.5):
            samples = samples.flip(-1)
        return nn.functional.cross_entropy(net(samples), data.labels[chosen])

    steps = recipe.epochs * (len(data.labels) // recipe.batch)
    return fit(net, loss_at, steps, "classifier", rate=recipe.learning_rate, decay=0.05, clip=math.inf)


def shifted(samples: Tensor, shift: list[int], paper: float) -> Tensor:
    """Shift samples by (rows, columns) and fill the edges with ``paper``."""
    rows, columns = shift
    reach = max(abs(rows), abs(columns))
    padded = nn.functional.pad(samples, (reach,) * 4, value=paper)
    height, width = samples.shape[-2:]
    top, left = reach - rows, reach - columns
    return padded[..., top : top + height, left : left + width]


@torch.no_grad()
def accuracy(net: nn.Module, data: Labelled) -> float:
    """Share of samples that are classified correctly."""
    correct = [
        (net(samples).argmax(dim=1) == labels).float()
        for samples, labels in zip(data.samples.split(1024), data.labels.split(1024), strict=True)
    ]
    return float(torch.cat(correct).mean())


def main(name: str, folder: str = "") -> None:
    """Train, and write the weights and the statistics of the real data to the package's folder of weights."""
    torch.set_num_threads(1)
    recipe, extractor = RECIPES[name], plugins.load("features", name)
    training, test = split_digits() if name == "digits_cnn" else split_photos(folder)
    net = train(extractor.NET, training, recipe)
    facts: dict[str, Any] = {
        "test_accuracy": round(accuracy(net, test), 4),
        "training_accuracy": round(accuracy(net, training), 4),
        "test_samples": len(test.labels),
        "training_samples": len(training.labels),
        "epochs": recipe.epochs,
        "torch": torch.__version__,
    }
    ship(net, WEIGHTS / f"{name}.safetensors", METADATA_KEY, facts, half=False)
    real = torch.from_numpy(Digits().reference().samples) if name == "digits_cnn" else training.samples
    reference, about = recipe.reference
    moments = feature_moments(extractor(), real, KEPT)
    Storage.at(WEIGHTS).write(f"{name}.{reference}.safetensors", moments.to_bytes(dataset=about))


if __name__ == "__main__":
    main(*sys.argv[1:])
