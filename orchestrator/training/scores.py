"""Scores a zoo model's ground-truth samples with a network trained on the real data, for the model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.audio.mel import vocode
from orchestrator.audio.recognisers.base import word_error_rate
from orchestrator.audio.recognisers.digits import understood
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.models.zoo.adapter import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from orchestrator.storage import Storage
from orchestrator.training.digits_recogniser import strings

GUIDANCE = (1.0, 2.0)
CLASSIFIERS = {(1, 8, 8): "digits_cnn", (1, 16, 16): "cifar10_gray16_cnn"}
"""Classifier that scores the samples, by sample shape."""
BATCH = 100


def score_samples(model: ZooModel, count: int = 200) -> str:
    """Score ground-truth samples of a model and describe the scores in a paragraph of Markdown.

    Args:
        model: The model.
        count: Samples per guidance scale.

    Returns:
        The paragraph; empty if no network scores the model's samples.
    """
    if model.net.conditioning == "spoken_digits":
        return _words(model, count)
    if model.shape in CLASSIFIERS:
        return _labels(model, count, plugins.build("features", CLASSIFIERS[model.shape]))
    return ""


def ground_truth(model: ZooModel, condition: Tensor, guidance_scale: float) -> Tensor:
    """Ground-truth samples of a model, (B, *shape), for these conditions, (B, ...)."""
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
        return float((classifier.classify(ground_truth(model, labels, scale)) == labels).float().mean())

    real = float(classifier.facts["test_accuracy"])
    return (
        f"Share of ground-truth samples that `{classifier.name}` assigns to their label: {_at_each(share)} ({count} "
        f"samples per guidance scale; its accuracy on real test images is {100 * real:.1f} %)."
    )


def _words(model: ZooModel, count: int) -> str:
    dataset = SpokenDigits()
    recordings, digits = strings(dataset, 0, count)

    def rate(strings: Tensor) -> float:
        return word_error_rate(digits, understood([vocode(string) for string in strings.numpy()]))

    condition = dataset.infilling(dataset.conditions(0, range(count)))
    sampled = _at_each(lambda scale: rate(ground_truth(model, condition, scale)))
    real = 100 * rate(recordings)
    return (
        f"The recogniser's word error rate on vocoded ground-truth samples ({count} per guidance scale, the prompt "
        f"included) is {sampled}. On the recordings, also vocoded, it is {real:.1f} %."
    )


def write_scores(weights: Path) -> str:
    """Score a model, append the paragraph to the model card beside its weights, and return it."""
    paragraph = score_samples(ZooModel(str(weights)))
    if paragraph:
        card = weights.with_suffix(".md")
        text = card.read_text(encoding="utf-8").rstrip("\n")
        Storage.at(card.parent).write(card.name, f"{text}\n\n{paragraph}\n".encode())
    return paragraph
