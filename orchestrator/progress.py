"""Progress on a terminal: bars with rate and time left, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

Note = Callable[[str], None]
"""Told what happens, in sentences for the user."""


def bar(total: int, unit: str, description: str) -> tqdm[NoReturn]:
    """A progress bar on standard error with rate and time left; nothing where that is no terminal."""
    return tqdm(
        total=total,
        unit=unit,
        desc=description,
        disable=None,
        dynamic_ncols=True,
        smoothing=0.1,
        bar_format="{desc:<20} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt} "
        "{elapsed}<{remaining}{postfix}",
    )


def note(sentence: str) -> None:
    """A line on standard error that does not tear a bar apart."""
    tqdm.write(sentence, file=sys.stderr)
