"""Progress on a terminal: notes, and bars with rate and time left that are hidden elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

Note = Callable[[str], None]
"""Callback for progress messages to the user, each a sentence."""


def bar(total: int, unit: str, description: str) -> tqdm[NoReturn]:
    """A progress bar on standard error with rate and time left; hidden if that is not a terminal."""
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
    """Print a line on standard error without breaking a progress bar."""
    tqdm.write(sentence, file=sys.stderr)
