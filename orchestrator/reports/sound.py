"""Sound in reports: waves as WAV files, and as players inside a page."""

from __future__ import annotations

import base64
import io
import wave
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.reports.gallery import Panel


class Heard(NamedTuple):
    """Samples of one solver as sound.

    Attributes:
        name: The solver.
        players: Each wave as a ``data:`` URI of a WAV file.
    """

    name: str
    players: list[str]


def wav(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    """A mono wave in [-1, 1], (N,), as a WAV file of 16 bits; louder values are clipped."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return sink.getvalue()


def players(panel: Panel) -> list[Heard]:
    """Audio players of a panel's strips; none for pictures."""
    found = []
    for strip in panel.strips:
        if strip.waves is not None and strip.rate is not None:
            uris = [base64.b64encode(wav(one, strip.rate)).decode() for one in strip.waves]
            found.append(Heard(strip.name, [f"data:audio/wav;base64,{uri}" for uri in uris]))
    return found
