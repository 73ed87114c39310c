"""Options and output that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from orchestrator.config.experiment import ExperimentConfig
    from orchestrator.results.store import Row

# Heavy imports (torch, ray, mlflow: seconds) stay inside the commands: --help and a typing error answer at once.

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def runs_hosts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that starts hosts."""
    for option in (
        click.option("--no-wait", is_flag=True, help="Fail at once where another process uses the same store."),
        click.option("--storage", metavar="ROOT", help="Root of pairs and results: a path, s3://… or gs://…"),
        click.option("--address", metavar="ADDR", help="Ray cluster ('auto', host:port); default: a local Ray."),
    ):
        command = option(command)
    return command


tracked = click.option("--tracking-uri", metavar="URI", help="MLflow store; default: SQLite under the storage root.")


def with_options(overrides: Sequence[str], storage: str | None, tracking_uri: str | None) -> list[str]:
    """Overrides with the options that stand for some: what is typed last wins."""
    given = [
        f"{key}={json.dumps(value)}" for key, value in (("storage", storage), ("tracking_uri", tracking_uri)) if value
    ]
    return [*overrides, *given]


def load(path: str, overrides: Sequence[str], storage: str | None, tracking_uri: str | None) -> ExperimentConfig:
    from orchestrator.config.reading import load_config

    return load_config(path, with_options(overrides, storage, tracking_uri))


def print_table(table: Sequence[Row]) -> None:
    """PSNR by solver and NFE; colours only on a terminal."""
    from rich.console import Console
    from rich.table import Table

    from orchestrator.reports.sweep import not_finite, summary

    console = Console(highlight=False)
    for scale in sorted({row.guidance_scale for row in table}):
        part = [row for row in table if row.guidance_scale == scale]
        nfes = sorted({row.nfe for row in part})
        shown = Table(title=f"PSNR (dB) on test pairs, guidance {scale:g}", title_justify="left")
        shown.add_column("solver")
        for nfe in nfes:
            shown.add_column(f"NFE {nfe}", justify="right")
        for line in summary(part):
            cells = []
            for nfe in nfes:
                row = line["cells"].get(nfe)
                text = "—" if row is None else f"{row.metrics['psnr_db']:.2f}{not_finite(row)}"
                cells.append(f"[bold green]{text}[/]" if row is not None and line["best"][nfe] else text)
            shown.add_row(line["name"], *cells, style="bold" if line["kind"] == "learned" else None)
        console.print(shown)
