"""Options and output shared by several commands."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.experiment import ExperimentConfig
    from orchestrator.results.store import Row
    from orchestrator.results.truth import Truth
    from solvers.theta import ThetaArtifact

# Imports of torch, ray and mlflow take seconds, so they stay inside the commands: --help and usage errors are instant.

FAILED, USAGE, UNEXPECTED, INTERRUPTED = 1, 2, 3, 130


class Place(NamedTuple):
    """Where a command that starts hosts runs, where it keeps its data, and whether it accepts any teacher."""

    address: str | None
    wait: bool
    storage: str | None
    tracking_uri: str | None = None
    force: bool = False


def runs_hosts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that start hosts; the command receives them as ``place``."""

    @functools.wraps(command)
    def placed(*, address: str | None, no_wait: bool, storage: str | None, force: bool, **arguments: Any) -> Any:
        tracking_uri = arguments.pop("tracking_uri", None)
        return command(place=Place(address, not no_wait, storage, tracking_uri, force), **arguments)

    for option in (
        click.option("--force", is_flag=True, help="Go on if the examination of the teacher refuses it."),
        click.option("--no-wait", is_flag=True, help="Fail immediately if another process uses the same store."),
        click.option("--storage", metavar="ROOT", help="Storage root of pairs and results: a path, s3://… or gs://…"),
        click.option("--address", metavar="ADDR", help="Ray cluster ('auto', host:port); default: a local Ray."),
    ):
        placed = option(placed)
    return placed


tracked = click.option("--tracking-uri", metavar="URI", help="MLflow store; default: SQLite under the storage root.")
stored = click.option(
    "--storage",
    metavar="ROOT",
    default="bespoke-data",
    show_default=True,
    help="Storage root of pairs, results and mlflow.db.",
)


def with_options(overrides: Sequence[str], place: Place) -> list[str]:
    """Append the options that set configuration keys to the overrides; later entries win."""
    options = {"storage": place.storage, "tracking_uri": place.tracking_uri}
    return [*overrides, *(f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None)]


def load(path: str, overrides: Sequence[str], place: Place) -> ExperimentConfig:
    """Load a configuration with overrides and the options that set configuration keys."""
    from orchestrator.config.reading import load_config

    return load_config(path, with_options(overrides, place))


def theta_file(path: str) -> ThetaArtifact:
    """Load a theta file that a user named."""
    from solvers.theta import load_theta

    try:
        return load_theta(path)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def exit_if_failed(failed: Mapping[str, str], log: str | None) -> None:
    """Print what failed, why, and where the details are, and exit."""
    for name, reason in failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if failed and log is not None:
        click.echo(f"details: {log}", err=True)
    if failed:
        sys.exit(FAILED)


def print_table(table: Sequence[Row], truths: Mapping[float, Truth] | None = None, pairs: str = "test") -> None:
    """Print PSNR by solver and NFE, in colour only on a terminal; those near ground truth's accuracy are marked."""
    from rich.console import Console
    from rich.table import Table

    from orchestrator.metrics.base import shown_db
    from orchestrator.reports.sweep import mark, not_finite, summary

    console = Console(highlight=False)
    for scale in sorted({row.guidance_scale for row in table}):
        part = [row for row in table if row.guidance_scale == scale]
        nfes = sorted({row.nfe for row in part})
        output = Table(title=f"PSNR (dB) on {pairs} pairs, guidance {scale:g}", title_justify="left")
        output.add_column("solver")
        for nfe in nfes:
            output.add_column(f"NFE {nfe}", justify="right")
        for line in summary(part):
            cells = []
            for nfe in nfes:
                row = line["cells"].get(nfe)
                text = (
                    "—"
                    if row is None
                    else f"{shown_db(row.metrics['psnr_db'], 2)}{mark(truths or {}, row)}{not_finite(row)}"
                )
                cells.append(f"[bold green]{text}[/]" if row is not None and line["best"][nfe] else text)
            output.add_row(line["name"], *cells, style="bold" if line["kind"] == "learned" else None)
        console.print(output)
        if truths and any(mark(truths, row) for row in part):
            click.echo(f"{truths[scale].footnote()}.")
