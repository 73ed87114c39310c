"""Output that goes to a file: a line at every stage and at least one a minute, and none after the end."""

from __future__ import annotations

import sys
import time
import types

import pytest

from orchestrator import progress
from orchestrator.progress import bar, stage


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_bar_in_a_file_is_lines_with_amounts_and_durations(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(1200, "pair", "ground-truth pairs") as progress_bar:
        assert _lines(capsys) == ["ground-truth pairs: 1,200 pairs"]
        progress_bar.update(1199)
        progress_bar.update()
        progress_bar.set_postfix_str(" 3/3 trials", refresh=False)
        assert progress_bar.n == 1200
    assert _lines(capsys) == ["ground-truth pairs: 1,200 of 1,200 pairs in 0 s 3/3 trials"]
    with bar(0, "pair", "nothing"):
        pass
    assert _lines(capsys) == []


def test_a_stage_speaks_again_and_again_until_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that loads for ten minutes, or work of which no part is done, is not silence."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    with stage("hosts load the model"), bar(4, "sample", "evaluation") as counted:
        counted.update()
        until, text = time.monotonic() + 10, ""
        while time.monotonic() < until and (text.count("so far") < 2 or text.count("s left") < 2):
            time.sleep(0.02)
            text += capsys.readouterr().err
    assert "hosts load the model: for 0 s so far" in text
    assert "evaluation: 1 of 4 samples in 0 s, about 0 s left" in text
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert _lines(capsys) == []


def test_a_notebook_gets_a_bar_and_a_file_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's standard error is not a terminal, but it shows bars."""
    with bar(2, "pair", "lines") as lines:
        lines.update(2)
    assert "lines: 2 of 2 pairs" in capsys.readouterr().err
    shell = type("ZMQInteractiveShell", (), {"config": {}})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with bar(2, "pair", "widget") as widget:
        widget.update(2)
    assert "widget: 100%" in capsys.readouterr().err
