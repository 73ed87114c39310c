"""Training of ``digits_cnn`` and its reference statistics: ``python -m orchestrator.features._digits_training``.

Seconds on one core. Run by hand where the network changes, and the two files it writes are committed.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from orchestrator.datasets.digits import Digits
from orchestrator.features.digits_cnn import METADATA_KEY, NAME, DigitsCNN, DigitsNet
from orchestrator.moments import WEIGHTS, feature_moments
from orchestrator.progress import bar
from orchestrator.storage import Storage

TEST_SAMPLES = 360
BATCH = 64
LEARNING_RATE = 3e-3


class Labelled(NamedTuple):
    """Samples (N, 1, 8, 8) in [-1, 1], float32, and labels (N,), int64."""

    samples: Tensor
    labels: Tensor


def split(seed: int = 0) -> tuple[Labelled, Labelled]:
    """Training and test digits: a fixed permutation, its first :data:`TEST_SAMPLES` held out."""
    reference = Digits().reference()
    order = torch.randperm(len(reference.labels), generator=torch.Generator().manual_seed(seed))
    samples, labels = torch.from_numpy(reference.samples)[order], torch.from_numpy(reference.labels)[order]
    test, train = slice(None, TEST_SAMPLES), slice(TEST_SAMPLES, None)
    return Labelled(samples[train], labels[train]), Labelled(samples[test], labels[test])


def train(epochs: int, seed: int = 0) -> DigitsNet:
    """A classifier of digits: AdamW with a one-cycle rate, on digits shifted by up to one pixel.

    Args:
        epochs: Passes over the training digits.
        seed: Seed of weights, order and shifts.
    """
    torch.manual_seed(seed)
    data, _ = split()
    net = DigitsNet()
    steps = epochs * (len(data.labels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    with bar(steps, "step", NAME) as progress:
        for _ in range(steps):
            chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = torch.nn.functional.cross_entropy(net(shifted(data.samples[chosen], shift)), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    return net.eval()


def shifted(samples: Tensor, shift: list[int]) -> Tensor:
    """Samples moved by (rows, columns) of at most one pixel; the paper that comes in is blank, -1."""
    rows, columns = shift
    padded = torch.nn.functional.pad(samples, (1, 1, 1, 1), value=-1.0)
    return padded[:, :, 1 - rows : 9 - rows, 1 - columns : 9 - columns]


def accuracy(net: DigitsNet, data: Labelled) -> float:
    """Share of digits whose class is found."""
    with torch.no_grad():
        return float((net(data.samples).argmax(dim=1) == data.labels).float().mean())


def main(epochs: int = 60) -> None:
    """Train, and write the weights and the real digits' statistics where the package finds them."""
    torch.set_num_threads(1)
    net = train(epochs)
    training, test = split()
    facts = {
        "test_accuracy": round(accuracy(net, test), 4),
        "training_accuracy": round(accuracy(net, training), 4),
        "test_samples": len(test.labels),
        "training_samples": len(training.labels),
        "epochs": epochs,
        "torch": torch.__version__,
    }
    target = Storage.at(WEIGHTS)
    target.write(f"{NAME}.safetensors", save(net.state_dict(), {METADATA_KEY: json.dumps(facts, sort_keys=True)}))
    real = torch.from_numpy(Digits().reference().samples)
    moments = feature_moments(DigitsCNN(), real)
    target.write(f"{NAME}.digits.safetensors", moments.to_bytes(dataset="digits, all 1,797 of scikit-learn"))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
