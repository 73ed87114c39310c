"""Networks of a notebook, and a folder to work in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of the API is a folder of the current one."""
    monkeypatch.chdir(tmp_path)
