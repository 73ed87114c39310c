"""Every block of docs/python.md runs as printed, one after another, as the cells of a notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
ON_RAY = "## On Ray"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run(cells: list[str]) -> dict[str, Any]:
    """Run cells in one namespace; what the last line of each shows can be shown."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec", dont_inherit=True), names)
    return names


@pytest.mark.slow
def test_the_page_runs_in_one_process() -> None:
    """Up to what needs Ray: zoo, functions, modules with guidance, arrays, saving, loading, exporting."""
    names = run(blocks(PAGE.partition(ON_RAY)[0]))
    assert names["digits"].shape == names["drawn"].shape == (16, 1, 8, 8)
    assert max(names["comparison"].psnr_db, key=names["comparison"].psnr_db.get) == "theta"
    assert names["actions"].shape == (5, 2)
    assert "<img" in names["solver"]._repr_html_()
    for file in ("theta.json", "sampler.py", "comparison.png"):
        assert Path(file).stat().st_size > 500


@pytest.mark.slow
def test_the_page_runs_on_ray() -> None:
    """A function of the notebook is sent to hosts; its sweep and its evaluation are as the command line's."""
    wanted = [
        cell for cell in blocks(PAGE) if "import Model" in cell or "plane = " in cell or "import evaluate" in cell
    ]
    wanted[0] = "from orchestrator import Model"
    names = run(wanted)
    learned = [row for row in names["table"].rows if row.kind == "learned"]
    assert learned[0].metrics["psnr_db"] == max(row.metrics["psnr_db"] for row in names["table"].rows)
    assert {row["metric"] for row in names["scores"].rows} == {"psnr_db", "rmse"}


def test_the_readme_begins_with_the_first_block_of_the_page() -> None:
    """So it runs as printed, too."""
    assert blocks(PAGE)[0] in blocks((ROOT / "README.md").read_text(encoding="utf-8"))[1]


@pytest.mark.parametrize("name", re.findall(r"`Model\.(\w+)\(", PAGE))
def test_the_ways_to_a_model_in_the_table_exist(name: str) -> None:
    """Each is a constructor of the class."""
    from orchestrator import Model

    assert callable(getattr(Model, name))
