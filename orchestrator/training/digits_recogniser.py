"""Trains the recogniser of spoken digits: ``python -m orchestrator.training.digits_recogniser FOLDER``.

FOLDER holds fsdd.parquet. Takes some minutes on one core. Run it by hand when the network changes, and commit the file
it writes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.audio.mel import SILENCE, log_mel, vocode
from orchestrator.audio.recognisers.base import word_error_rate
from orchestrator.audio.recognisers.digits import BLANK, METADATA_KEY, STRIDE, WEIGHTS, DigitsNet
from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits
from orchestrator.training import fitting
from orchestrator.weights.shipped import ship

BATCH = 64
TESTED = 400
VOCODED = 100


def strings(dataset: SpokenDigits, seed: int, count: int) -> tuple[Tensor, list[list[int]]]:
    """Features of real strings, the prompt included, and the digits spoken in each."""
    plans = dataset.conditions(seed, range(count))
    digits = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    return dataset.real(plans), digits


def disturbed(features: Tensor, generator: torch.Generator) -> Tensor:
    """Augment features with random speed, gain, spectral tilt and noise, to which a recogniser must be invariant."""
    speed = float(torch.empty(()).uniform_(0.85, 1.2, generator=generator))
    stretched = nn.functional.interpolate(features, scale_factor=speed, mode="linear")[:, :, :FRAMES]
    padded = nn.functional.pad(stretched, (0, FRAMES - stretched.shape[2]), value=SILENCE)
    return fitting.disturbed(padded, 0.3, 0.3, generator)


def train(dataset: SpokenDigits, steps: int, seed: int = 0) -> DigitsNet:
    """Train a recogniser by connectionist temporal classification (CTC) on augmented strings."""
    torch.manual_seed(seed)
    net = DigitsNet()
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        features, digits = strings(dataset, 10_000 + step, BATCH)
        # Slowed-down strings are cut off at the end. They are few, and their wrong targets only add noise.
        scores = net(disturbed(features, generator))
        targets = torch.tensor([digit for string in digits for digit in string])
        lengths = torch.tensor([len(string) for string in digits])
        output_lengths = torch.full((BATCH,), FRAMES // STRIDE)
        return nn.functional.ctc_loss(scores, targets, output_lengths, lengths, blank=BLANK)

    return fitting.fit(net, loss_at, steps, "recogniser", rate=2e-3, decay=0.01, clip=1.0)


def main(folder: str, steps: str = "1500") -> None:
    """Train, measure on held-out recordings, and write the weights to the package."""
    torch.set_num_threads(1)
    net = train(SpokenDigits(folder, "train"), int(steps))
    features, digits = strings(SpokenDigits(), 0, TESTED)
    # In use, the recogniser hears sound that was vocoded from features.
    vocoded = [log_mel(vocode(np.asarray(string))) for string in features[:VOCODED]]
    heard = [net.strings(torch.from_numpy(string)[None])[0] for string in vocoded]
    facts = {
        "test_wer": round(word_error_rate(digits, net.strings(features)), 4),
        "test_wer_vocoded": round(word_error_rate(digits[:VOCODED], heard), 4),
        "test_strings": TESTED,
        "steps": int(steps),
        "torch": torch.__version__,
    }
    ship(net, WEIGHTS, METADATA_KEY, facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
