"""Trains the speaker encoder for six speakers: ``python -m orchestrator.training.digits_speakers FOLDER``.

FOLDER holds fsdd.parquet. Takes some minutes on one core, half of them for vocoding. Run it by hand when the network
changes, and commit the file it writes.
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
from orchestrator.training.fitting import disturbed, fit
from orchestrator.weights.shipped import ship

BATCH = 64
FRAMES = 48
"""Frames of a training string: 0.75 s."""
SCALE, MARGIN = 16.0, 0.2
"""AM-softmax (Wang et al. 2018): MARGIN is subtracted from the true speaker's cosine, then all are scaled by SCALE."""
TESTED = 300


def vocoded(features: Sequence[FloatArray]) -> list[FloatArray]:
    """Vocode features to sound and extract features again, as an encoder receives them for generated sound."""
    results = []
    with bar(len(features), "recording", "vocode") as progress:
        for recording in features:
            results.append(log_mel(vocode(recording)))
            progress.update()
    return results


def strings(versions: Sequence[Recordings], rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Random strings of recordings by one speaker each, with pauses, (count, MELS, FRAMES), and their speakers.

    Args:
        versions: The same recordings, original and vocoded; each string is built from one version.
        rng: Source of all randomness.
        count: Number of strings.
    """
    speakers = sorted(set(versions[0].speakers))
    own = [np.flatnonzero(np.array(versions[0].speakers) == speaker) for speaker in speakers]
    labels = np.arange(count) % len(speakers)
    batch = np.empty((count, MELS, FRAMES), dtype=np.float32)
    for string, label in zip(batch, labels, strict=True):
        features = versions[int(rng.integers(len(versions)))].features
        parts: list[FloatArray] = []
        while sum(part.shape[1] for part in parts) < 2 * FRAMES:
            pause = np.full((MELS, int(rng.integers(1, 8))), SILENCE, dtype=np.float32)
            parts += [features[rng.choice(own[label])], pause]
        joined = np.concatenate(parts, axis=1)
        first = rng.integers(joined.shape[1] - FRAMES + 1)
        string[:] = joined[:, first : first + FRAMES]
    return torch.from_numpy(batch), torch.from_numpy(labels)


def train(versions: Sequence[Recordings], steps: int, seed: int = 0) -> SpeakerNet:
    """Train an encoder by classifying the speakers from cosines between embeddings and speaker directions."""
    torch.manual_seed(seed)
    net = SpeakerNet()
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

    def loss_at(step: int) -> Tensor:
        features, labels = strings(versions, rng, BATCH)
        cosines = net.cosines(net(disturbed(features, 0.2, 0.4, generator)))
        target = nn.functional.one_hot(labels, cosines.shape[1])
        return nn.functional.cross_entropy(SCALE * (cosines - MARGIN * target), labels, label_smoothing=0.05)

    return fit(net, loss_at, steps, "speaker encoder", rate=2e-3, decay=0.01, clip=1.0)


def equal_error_rate(same: Tensor, different: Tensor) -> float:
    """Error rate at the threshold that rejects same-voice pairs as often as it accepts different-voice pairs."""
    thresholds = torch.cat([same, different]).sort().values
    rejected = (same[None] < thresholds[:, None]).double().mean(dim=1)
    accepted = (different[None] >= thresholds[:, None]).double().mean(dim=1)
    best = (rejected - accepted).abs().argmin()
    return float((rejected[best] + accepted[best]) / 2)


@torch.no_grad()
def measured(net: SpeakerNet, recordings: Recordings) -> dict[str, float]:
    """Accuracy and equal error rate on strings of held-out recordings."""
    features, labels = strings([recordings], np.random.default_rng(1), TESTED)
    directions = net(features)
    similarities, same_voice = directions @ directions.T, labels[:, None] == labels[None]
    upper = torch.ones_like(same_voice).triu(diagonal=1)
    return {
        "accuracy": round(float((net.cosines(directions).argmax(dim=1) == labels).double().mean()), 4),
        "equal_error_rate": round(
            equal_error_rate(similarities[same_voice & upper], similarities[~same_voice & upper]), 4
        ),
    }


def main(folder: str, steps: str = "600") -> None:
    """Train, measure on held-out recordings, and write the weights to the package."""
    torch.set_num_threads(1)
    raw, held_out = SpokenDigits(folder, "train").recordings, SpokenDigits().recordings
    versions = [raw, raw._replace(features=vocoded(raw.features))]
    net = train(versions, int(steps))
    held_out_vocoded = held_out._replace(features=vocoded(held_out.features))
    facts = {
        **{f"test_{name}": value for name, value in measured(net, held_out).items()},
        **{f"test_{name}_vocoded": value for name, value in measured(net, held_out_vocoded).items()},
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
