"""Draws a sheet of a zoo model's samples, for visual inspection and for the model card."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from orchestrator.audio.mel import LOUDEST, SILENCE
from orchestrator.datasets.spoken_digits import SpokenDigits
from orchestrator.models.zoo.adapter import ZooModel
from orchestrator.storage import Storage
from orchestrator.training.scores import ground_truth

PER_CLASS = 10
STRINGS = 12
LARGEST = 256
"""Upper limit of a sample's longer side after enlargement, in pixels."""
ENLARGED = 6
"""Largest factor by which samples are enlarged; tiny images would be hard to see."""


def write_sheet(weights: Path) -> Path:
    """Sample a model with the adaptive solver and write ``{name}.png`` beside its weights.

    Images have one column per class. Speech has one row per string: masked input, sample and recording.

    Args:
        weights: The model's safetensors file.

    Returns:
        Path of the image.
    """
    model = ZooModel(str(weights))
    rows, columns, samples = _strings(model) if len(model.shape) == 2 else _classes(model)
    height, width = samples.shape[-2:]
    framed = torch.nn.functional.pad(samples, (0, 1, 0, 1))  # a grey line between neighbouring samples
    grid = framed.view(rows, columns, -1, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * (height + 1), columns * (width + 1), -1).clamp(-1, 1)
    picture = Image.fromarray(((pixels + 1) * 127.5).to(torch.uint8).squeeze(-1).numpy())
    enlarged = max(1, min(ENLARGED, LARGEST // max(height, width)))
    buffer = io.BytesIO()
    picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST).save(buffer, "PNG")
    target = weights.with_suffix(".png")
    Storage.at(weights.parent).write(target.name, buffer.getvalue())
    return target


def _classes(model: ZooModel) -> tuple[int, int, Tensor]:
    """Numbers of rows and columns, and the images in [-1, 1], row by row."""
    labels = torch.arange(model.net.classes).repeat(PER_CLASS)
    return PER_CLASS, model.net.classes, ground_truth(model, labels, 1.0)


def _strings(model: ZooModel) -> tuple[int, int, Tensor]:
    """Numbers of rows and columns, and the spectrograms, row by row; low frequencies at the bottom, silence black."""
    dataset = SpokenDigits()
    plans = dataset.conditions(0, range(STRINGS))
    condition, real = dataset.infilling(plans), dataset.real(plans)
    masked = condition[:, -2:-1].bool()
    trio = torch.stack([real.masked_fill(masked, SILENCE), ground_truth(model, condition, 1.0), real], dim=1)
    brightness = 2 * (trio - SILENCE) / (LOUDEST - SILENCE) - 1
    return STRINGS, 3, brightness.flatten(0, 1).flip(-2)
