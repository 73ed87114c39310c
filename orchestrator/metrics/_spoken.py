"""Cuts the spoken part out of generated sound, for speech metrics."""

from __future__ import annotations

import numpy as np

from orchestrator.audio.mel import FloatArray
from orchestrator.metrics.base import Batch, needs


def spoken_part(batch: Batch, metric: str) -> list[FloatArray]:
    """The spoken part of each wave of a batch; the whole wave for real data, which has no conditions.

    Args:
        batch: Sound.
        metric: Name of the metric, for error messages.
    """
    waves = batch.samples.detach().float().cpu().numpy()
    if batch.conditions is None:
        return list(waves)
    assert batch.rate is not None
    seconds = needs(batch.dataset, "spoken", metric)(batch.conditions)
    return [
        np.ascontiguousarray(wave[round(first * batch.rate) : round(last * batch.rate)])
        for wave, (first, last) in zip(waves, seconds, strict=True)
    ]
