"""Progress: notes, stages and bars on a terminal; in a file, a line at every stage and at least one a minute."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from tqdm import TqdmWarning, tqdm

Note = Callable[[str], None]
"""Callback for progress messages to the user, each a sentence."""

LINE_SECONDS = 60.0
"""Longest time between two lines of a stage, if standard error is not a terminal."""


def bar(total: int, unit: str, description: str) -> Any:
    """A progress bar with rate and time left, on a terminal and in a notebook; lines elsewhere.

    Returns:
        A context manager with tqdm's ``update(count)``, ``set_postfix_str(text, refresh)``, ``n`` and ``close()``.
    """
    if in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets it writes a text bar
            from tqdm.auto import tqdm as widget
        return widget(total=total, unit=unit, desc=description, smoothing=0.1)
    if not sys.stderr.isatty():
        return stage(description, total, unit)
    return tqdm(
        total=total,
        unit=unit,
        desc=description,
        dynamic_ncols=True,
        smoothing=0.1,
        bar_format="{desc:<20} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt} "
        "{elapsed}<{remaining}{postfix}",
    )


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def counted(count: int, noun: str) -> str:
    """A count with its noun, given in the singular: '1 sample', '1,024 samples'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def note(sentence: str) -> None:
    """Print a line on standard error without breaking a progress bar."""
    tqdm.write(sentence, file=sys.stderr)


class stage:  # noqa: N801 (used as a function, like contextlib's context managers)
    """A stage of a command: a line when it begins, and one a minute while it lasts unless there is a terminal.

    Args:
        description: What is done, e.g. 'ground-truth pairs' or 'starting hosts'.
        total: Amount of work; None if it is not counted.
        unit: What is counted, in the singular.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = ""):
        self.description, self.total, self.unit = description, total, unit
        self.n, self.postfix = 0, ""
        self.begin = time.monotonic()
        self.ended = threading.Event()
        if total != 0:
            note(description if total is None else f"{description}: {counted(total, unit)}")
        if not sys.stderr.isatty():
            threading.Thread(target=self._speak, daemon=True).start()

    def update(self, count: int = 1) -> None:
        """Count work that is done."""
        self.n += count

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Text after the numbers; ``refresh`` has a meaning for bars only."""
        self.postfix = text

    def close(self) -> None:
        """End the stage; of counted work, a last line gives the amount and the duration."""
        if self.total and not self.ended.is_set():
            note(self._line())
        self.ended.set()

    def __enter__(self) -> stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.close()
        self.ended.set()

    def _speak(self) -> None:
        while not self.ended.wait(LINE_SECONDS):
            note(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self.begin
        if self.total is None:
            return f"{self.description}: for {seconds:.0f} s so far"
        left = ""
        if 0 < self.n < self.total:
            left = f", about {seconds * (self.total - self.n) / self.n:.0f} s left"
        return (
            f"{self.description}: {self.n:,} of {counted(self.total, self.unit)} in {seconds:.0f} s{left}{self.postfix}"
        )
