"""Progress bars on a terminal, and none elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from orchestrator.progress import bar, note


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Logs of a cluster job do not fill with carriage returns."""
    with bar(10, "pair", "ground-truth pairs") as progress:
        progress.update(5)
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_progress_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentage, count, elapsed and remaining time."""
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with bar(10, "pair", "ground-truth pairs") as progress:
        progress.update(5)
        progress.refresh()
    assert re.search(r"ground-truth pairs +50% \|.*\| 5/10 .*pair.* \d\d:\d\d<\d\d:\d\d", terminal.getvalue())


def test_a_note_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is only for results, so that it can be piped."""
    note("making 1 damaged shard again")
    assert capsys.readouterr() == ("", "making 1 damaged shard again\n")
