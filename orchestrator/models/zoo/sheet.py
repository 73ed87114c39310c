"""A sheet of a zoo model's samples, for people to look at: does it draw what it was trained on?"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from orchestrator.models.zoo.adapter import ZooModel
from orchestrator.pairs.ground_truth import solve
from orchestrator.randomness import noise
from orchestrator.storage import Storage

PER_CLASS = 10
ENLARGED = 6
"""Screen pixels per image pixel: tiny images are not seen otherwise."""


def write_sheet(weights: Path) -> Path:
    """Sample an image model by its adaptive solver, one column a class, and write ``{name}.png`` beside its weights.

    Args:
        weights: The model's safetensors file.

    Returns:
        The picture.
    """
    model = ZooModel(str(weights))
    channels, height, width = model.shape
    labels = torch.arange(model.net.classes).repeat(PER_CLASS)
    x0 = torch.from_numpy(noise(0, range(len(labels)), model.shape))
    samples, *_ = solve(model.field(labels, 1.0), x0, rtol=1e-4, atol=1e-4)
    framed = torch.nn.functional.pad(samples, (0, 1, 0, 1))  # a grey line between neighbours
    grid = framed.view(PER_CLASS, model.net.classes, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(PER_CLASS * (height + 1), model.net.classes * (width + 1), channels).clamp(-1, 1)
    picture = Image.fromarray(((pixels + 1) * 127.5).to(torch.uint8).squeeze(-1).numpy())
    buffer = io.BytesIO()
    picture.resize((picture.width * ENLARGED, picture.height * ENLARGED), Image.Resampling.NEAREST).save(buffer, "PNG")
    target = weights.with_suffix(".png")
    Storage.at(weights.parent).write(target.name, buffer.getvalue())
    return target
