"""Sound in reports: WAV files, and audio players embedded in the HTML page."""

from __future__ import annotations

import base64
import io
import wave
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.reports.gallery import Panel


class Heard(NamedTuple):
    """Audio players for the samples of one solver.

    Attributes:
        name: Name of the solver.
        players: One ``data:`` URI of a WAV file per wave.
    """

    name: str
    players: list[str]


def wav(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    """Encode a mono wave in [-1, 1], (N,), as a 16-bit WAV file; values outside the range are clipped."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return sink.getvalue()


def players(panel: Panel) -> list[Heard]:
    """Audio players for the strips of a panel that have sound; empty for images."""
    heard = []
    for strip in panel.strips:
        if strip.waves is not None and strip.rate is not None:
            uris = [base64.b64encode(wav(one, strip.rate)).decode() for one in strip.waves]
            heard.append(Heard(strip.name, [f"data:audio/wav;base64,{uri}" for uri in uris]))
    return heard
