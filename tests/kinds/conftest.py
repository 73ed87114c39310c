"""The files of the examples, trained once in a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kinds.examples import Example


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[Example], Path]:
    """The folder of an example's files; the processes of a session share it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "kinds"
    return lambda example: example.prepare(shared)
