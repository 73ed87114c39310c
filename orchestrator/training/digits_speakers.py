"""Training of the encoder of six speakers: ``python -m orchestrator.training.digits_speakers FOLDER``.

FOLDER holds fsdd.parquet. Some minutes on one core, half of them vocoding. Run by hand where the network changes; the
file is committed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.audio.mel import HOP, MELS, RATE, SILENCE, FloatArray, log_mel, vocode
from orchestrator.audio.speaker_encoders.digits_speakers import METADATA_KEY, WEIGHTS, SpeakerNet
from orchestrator.datasets.spoken_digits import Recordings, SpokenDigits
from orchestrator.progress import bar
from orchestrator.weights.shipped import ship

BATCH = 64
FRAMES = 48
"""Of a string that is trained on: 0.75 s."""
LEARNING_RATE = 2e-3
SCALE, MARGIN = 16.0, 0.2
"""Cosines are sharpened by the one after the other is taken off the right speaker's (Wang et al. 2018, AM-softmax)."""
TESTED = 300


def vocoded(features: Sequence[FloatArray]) -> list[FloatArray]:
    """The features of what these features sound like: what an encoder hears of generated sound."""
    heard = []
    with bar(len(features), "recording", "vocode") as progress:
        for one in features:
            heard.append(log_mel(vocode(one)))
            progress.update()
    return heard


def strings(versions: Sequence[Recordings], rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Strings of recordings of one speaker with pauses, cut to one length, (count, MELS, FRAMES), and the speakers.

    Args:
        versions: The same recordings as they were and as they sound vocoded: a string is of one of them.
        rng: Draws all there is to draw.
        count: Of strings.
    """
    speakers = sorted(set(versions[0].speakers))
    own = [np.flatnonzero(np.array(versions[0].speakers) == speaker) for speaker in speakers]
    labels = np.arange(count) % len(speakers)
    found = np.empty((count, MELS, FRAMES), dtype=np.float32)
    for string, label in zip(found, labels, strict=True):
        features = versions[int(rng.integers(len(versions)))].features
        parts: list[FloatArray] = []
        while sum(part.shape[1] for part in parts) < 2 * FRAMES:
            pause = np.full((MELS, int(rng.integers(1, 8))), SILENCE, dtype=np.float32)
            parts += [features[rng.choice(own[label])], pause]
        whole = np.concatenate(parts, axis=1)
        first = rng.integers(whole.shape[1] - FRAMES + 1)
        string[:] = whole[:, first : first + FRAMES]
    return torch.from_numpy(found), torch.from_numpy(labels)


def disturbed(features: Tensor, generator: torch.Generator) -> Tensor:
    """Louder or softer, brighter or duller, noisier: what must not change whose voice it is."""
    count = len(features)
    gain, tilt = torch.randn(2, count, 1, 1, generator=generator) * torch.tensor([0.2, 0.2]).view(2, 1, 1, 1)
    slope = torch.linspace(-1, 1, features.shape[1]).view(1, -1, 1)
    level = 0.4 * torch.rand(count, 1, 1, generator=generator)
    return (features + gain + tilt * slope + level * torch.randn(features.shape, generator=generator)).clamp_min(
        SILENCE
    )


def train(versions: Sequence[Recordings], steps: int, seed: int = 0) -> SpeakerNet:
    """An encoder by classification of the speakers by the cosines of directions."""
    torch.manual_seed(seed)
    net = SpeakerNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    net.train()
    with bar(steps, "step", "speaker encoder") as progress:
        for _ in range(steps):
            features, labels = strings(versions, rng, BATCH)
            cosines = net.cosines(net(disturbed(features, generator)))
            right = nn.functional.one_hot(labels, cosines.shape[1])
            loss = nn.functional.cross_entropy(SCALE * (cosines - MARGIN * right), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix_str(f" loss {loss.item():.3f}", refresh=False)
    return net.eval()


def equal_error_rate(same: Tensor, different: Tensor) -> float:
    """Where as many pairs of one voice are refused as pairs of two are accepted: the rate of either."""
    thresholds = torch.cat([same, different]).sort().values
    refused = (same[None] < thresholds[:, None]).double().mean(dim=1)
    accepted = (different[None] >= thresholds[:, None]).double().mean(dim=1)
    best = (refused - accepted).abs().argmin()
    return float((refused[best] + accepted[best]) / 2)


@torch.no_grad()
def measured(net: SpeakerNet, recordings: Recordings) -> dict[str, float]:
    """Accuracy and equal error rate on strings of recordings that were not trained on."""
    features, labels = strings([recordings], np.random.default_rng(1), TESTED)
    directions = net(features)
    similarities, alike = directions @ directions.T, labels[:, None] == labels[None]
    once = torch.ones_like(alike).triu(diagonal=1)
    return {
        "accuracy": round(float((net.cosines(directions).argmax(dim=1) == labels).double().mean()), 4),
        "equal_error_rate": round(equal_error_rate(similarities[alike & once], similarities[~alike & once]), 4),
    }


def main(folder: str, steps: str = "600") -> None:
    """Train, measure on recordings that were not trained on, and write the weights where the package finds them."""
    torch.set_num_threads(1)
    raw, held_out = SpokenDigits(folder, "train").recordings, SpokenDigits().recordings
    versions = [raw, raw._replace(features=vocoded(raw.features))]
    net = train(versions, int(steps))
    again = held_out._replace(features=vocoded(held_out.features))
    facts = {
        **{f"test_{name}": value for name, value in measured(net, held_out).items()},
        **{f"test_{name}_vocoded": value for name, value in measured(net, again).items()},
        "test_strings": TESTED,
        "seconds": FRAMES * HOP / RATE,
        "speakers": sorted(set(raw.speakers)),
        "steps": int(steps),
        "seed": 0,
        "torch": torch.__version__,
    }
    ship(net, WEIGHTS, METADATA_KEY, facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
