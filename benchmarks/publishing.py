"""Result files of the benchmarks: dated Markdown tables with the machine, its load and the command that made them."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

RESULTS = Path(__file__).parent / "results"

quick_option = click.option("--quick", is_flag=True, help="Smaller and noisier; takes less than 90 s.")
results_option = click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder of the result file.",
    show_default="benchmarks/results",
)


def command(summary: str | None) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command whose help is the module's docstring, with its line breaks kept."""
    text = "\n\n".join("\b\n" + part for part in (summary or "").strip().split("\n\n"))
    return click.command(help=text, context_settings={"show_default": True, "max_content_width": 120})


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Format floats beforehand."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def load() -> float:
    """Load average over the last minute."""
    return os.getloadavg()[0]


def publish(folder: Path, name: str, title: str, sections: Sequence[str], *, quick: bool, load_before: float) -> Path:
    """Print the sections and write them to ``folder/DATE-NAME.md``, or ``DATE-NAME-quick.md`` for a quick run.

    Args:
        folder: Folder of the file; created if missing.
        name: Name of the benchmark, part of the file's name.
        title: First line.
        sections: Markdown paragraphs and tables.
        quick: Whether this was a quick run.
        load_before: :func:`load` before the benchmark began, which shows other work of the machine.
    """
    today = datetime.date.today().isoformat()
    body = "\n\n".join(sections)
    click.echo(f"\n{title}\n\n{body}\n")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{today}-{name}{'-quick' if quick else ''}.md"
    call = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path.write_text(
        f"# {title}\n\n{today} · {os.cpu_count()} CPU cores ({platform.machine()}) · torch {torch.__version__} · load "
        f"average before the run {load_before:.1f} · made by `python {call}`.\n\n{body}\n",
        encoding="utf-8",
    )
    click.echo(f"wrote {path.name} to {path.parent.name}/")
    return path
