"""Training of the recogniser of spoken digits: ``python -m orchestrator.training.digits_recogniser FOLDER``.

FOLDER holds fsdd.parquet. Some minutes on one core. Run by hand where the network changes; the file is committed.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.audio.digits_recogniser import BLANK, METADATA_KEY, STRIDE, WEIGHTS, Recogniser, word_error_rate
from orchestrator.audio.mel import SILENCE, vocode
from orchestrator.datasets.spoken_digits import FRAMES, SpokenDigits
from orchestrator.progress import bar
from orchestrator.weights.shipped import ship

BATCH = 64
LEARNING_RATE = 2e-3
TESTED = 400
VOCODED = 100


def strings(dataset: SpokenDigits, seed: int, count: int) -> tuple[Tensor, list[list[int]]]:
    """Strings as they were spoken, the prompt and all, and their digits."""
    plans = dataset.conditions(seed, range(count))
    digits = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]
    return dataset.real(plans), digits


def disturbed(features: Tensor, generator: torch.Generator) -> Tensor:
    """Faster or slower, louder or softer, brighter or duller, noisier: what must not change what is understood."""
    count = len(features)
    speed = float(torch.empty(()).uniform_(0.85, 1.2, generator=generator))
    stretched = nn.functional.interpolate(features, scale_factor=speed, mode="linear")[:, :, :FRAMES]
    padded = nn.functional.pad(stretched, (0, FRAMES - stretched.shape[2]), value=SILENCE)
    gain, tilt = torch.randn(2, count, 1, 1, generator=generator) * torch.tensor([0.2, 0.3]).view(2, 1, 1, 1)
    slope = torch.linspace(-1, 1, features.shape[1]).view(1, -1, 1)
    level = 0.3 * torch.rand(count, 1, 1, generator=generator)
    return (padded + gain + tilt * slope + level * torch.randn(padded.shape, generator=generator)).clamp_min(SILENCE)


def train(dataset: SpokenDigits, steps: int, seed: int = 0) -> Recogniser:
    """A recogniser by connectionist temporal classification on disturbed strings."""
    torch.manual_seed(seed)
    net = Recogniser()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    with bar(steps, "step", "recogniser") as progress:
        for step in range(steps):
            features, digits = strings(dataset, 10_000 + step, BATCH)
            # A faster string is cut off at the end; the loss of such a one is no more than noise, and they are few.
            scores = net(disturbed(features, generator))
            targets = torch.tensor([digit for string in digits for digit in string])
            lengths = torch.tensor([len(string) for string in digits])
            outward = torch.full((BATCH,), FRAMES // STRIDE)
            loss = nn.functional.ctc_loss(scores, targets, outward, lengths, blank=BLANK)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix_str(f" loss {loss.item():.3f}", refresh=False)
    return net.eval()


def main(folder: str, steps: str = "1500") -> None:
    """Train, measure on recordings that were not trained on, and write the weights where the package finds them."""
    from orchestrator.audio.mel import log_mel

    torch.set_num_threads(1)
    net = train(SpokenDigits(folder, "train"), int(steps))
    features, digits = strings(SpokenDigits(), 0, TESTED)
    # As it is used: on sound made of features.
    again = [log_mel(vocode(np.asarray(string))) for string in features[:VOCODED]]
    heard = [net.strings(torch.from_numpy(string)[None])[0] for string in again]
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
