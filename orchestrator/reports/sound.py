"""Sound in reports: WAV files, and audio players embedded in the HTML page."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import numpy.typing as npt

from orchestrator.reports.gallery import Panel

Players = tuple[str, list[str]]
"""Audio players for one solver: its name, and a ``data:`` URI of a WAV file per wave."""


def wav(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    """Encode a mono wave in [-1, 1], (N,), as a 16-bit WAV file; values outside the range are clipped."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return sink.getvalue()


def players(panel: Panel) -> list[Players]:
    """Audio players for the strips of a panel that have sound; empty for images."""
    return [
        (
            strip.name,
            [f"data:audio/wav;base64,{base64.b64encode(wav(one, strip.rate)).decode()}" for one in strip.waves],
        )
        for strip in panel.strips
        if strip.waves is not None and strip.rate is not None
    ]
