"""Is a zoo model good enough to mean something? A network that was trained on the real data judges its samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.digits_recogniser import understood, word_error_rate
from orchestrator.audio.mel import vocode
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.models.zoo.adapter import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from orchestrator.storage import Storage

GUIDANCE = (1.0, 2.0)
CLASSIFIERS = {(1, 8, 8): "digits_cnn", (1, 16, 16): "cifar10_gray16_cnn"}
"""By the shape of a sample."""
BATCH = 100


def score_samples(model: ZooModel, count: int = 200) -> str:
    """What a judge finds in ground-truth samples, as a paragraph of Markdown; empty where there is no judge.

    Args:
        model: The model.
        count: Samples at each guidance scale.
    """
    if model.net.conditioning == "spoken_digits":
        return _words(model, count)
    if model.shape in CLASSIFIERS:
        return _labels(model, count, plugins.build("features", CLASSIFIERS[model.shape]))
    return ""


def _sampled(model: ZooModel, condition: Tensor, guidance_scale: float) -> Tensor:
    x0 = torch.from_numpy(noise(0, range(len(condition)), model.shape))
    parts = [
        solve(model.field(part, guidance_scale), start, rtol=1e-4, atol=1e-4).x1
        for part, start in zip(condition.split(BATCH), x0.split(BATCH), strict=True)
    ]
    return torch.cat(parts)


def _at_each(measure: Callable[[float], float]) -> str:
    return ", ".join(f"{100 * measure(scale):.1f} % at guidance {scale:g}" for scale in GUIDANCE)


def _labels(model: ZooModel, count: int, classifier: Any) -> str:
    labels = torch.arange(count) % model.net.classes

    def share(scale: float) -> float:
        return float((classifier.classify(_sampled(model, labels, scale)) == labels).float().mean())

    real = float(classifier.facts["test_accuracy"])
    return (
        f"`{classifier.name}`, which is right on {100 * real:.1f} % of real test images, finds the label that was "
        f"asked for in {_at_each(share)} ({count} ground-truth samples each)."
    )


def _words(model: ZooModel, count: int) -> str:
    dataset = SpokenDigits()
    plans = dataset.conditions(0, range(count))
    said = [[int(dataset.recordings.digits[number]) for number, _ in dataset.placed(plan)] for plan in plans]

    def rate(strings: Tensor) -> float:
        return word_error_rate(said, understood([vocode(string) for string in strings.numpy()]))

    condition = dataset.infilling(plans)
    sampled = _at_each(lambda scale: rate(_sampled(model, condition, scale)))
    real = 100 * rate(dataset.real(plans))
    return (
        f"The recogniser's word error rate on vocoded ground-truth samples ({count} each, the prompt included) is "
        f"{sampled}; on the recordings, vocoded alike, {real:.1f} %."
    )


def write_scores(weights: Path) -> str:
    """Judge a model and add what was found to its card, beside its weights."""
    found = score_samples(ZooModel(str(weights)))
    if found:
        card = weights.with_suffix(".md")
        text = card.read_text(encoding="utf-8").rstrip("\n")
        Storage.at(card.parent).write(card.name, f"{text}\n\n{found}\n".encode())
    return found
