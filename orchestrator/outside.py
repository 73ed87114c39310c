"""Asks everything outside this process (servers, storage, clusters) at the same time and with one deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from orchestrator.errors import UserError

ANSWER_SECONDS = 10.0
"""Time in which everything outside must have answered. Client libraries by themselves try for minutes, in silence."""


_asking: list[threading.Thread] = []


def unanswered() -> bool:
    """Whether a question is still open. Its library may keep the process from ending by itself."""
    return any(thread.is_alive() for thread in _asking)


def ask(questions: Mapping[str, Callable[[], object]], seconds: float = ANSWER_SECONDS) -> None:
    """Ask all at the same time, and return when all have answered.

    Args:
        questions: Name of each service, and a function that contacts it and raises if it cannot be used.
        seconds: Deadline for all of them together.

    Raises:
        UserError: One of them did not answer in time; the message names it.
        Exception: The first refusal, in the order of the questions.
    """
    refusals: dict[str, Exception] = {}

    def put(name: str, question: Callable[[], object]) -> None:
        try:
            question()
        except Exception as error:
            refusals[name] = error

    # Daemons, since a library that does not return cannot be stopped, and must not keep the program from ending.
    threads = {n: threading.Thread(target=put, args=(n, q), daemon=True) for n, q in questions.items()}
    _asking[:] = threads.values()
    until = time.monotonic() + seconds
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    for name, thread in threads.items():
        if name in refusals:
            raise refusals[name]
        if thread.is_alive():
            raise UserError(
                f"{name} did not answer within {seconds:g} s; check that it is running and can be reached from here"
            )
