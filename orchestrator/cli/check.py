"""``bespoke check``: looks at a teacher before anything is made with it."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.shared import FAILED, Place, load, runs_hosts

if TYPE_CHECKING:
    from sweeps.check import Checked
    from sweeps.examination import Examination

# Imports of torch and ray take seconds, so they stay inside the commands: --help and usage errors are instant.


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@runs_hosts
def check(config: str, overrides: tuple[str, ...], as_json: bool, place: Place) -> None:
    """Examine the model of CONFIG in at most 200 evaluations: findings, measured values, and a figure.

    A sweep does the same before it makes pairs. The model runs in this process; with --address, on hosts of a cluster.
    The exit code is 1 if a sweep would refuse the model (0 with --force).

    \b
    Examples:
      bespoke check sweeps/configs/digits.yaml
      bespoke check my_model.yaml guidance_scale=[1.0,3.0] --json
    """
    loaded = load(config, overrides, place)
    from sweeps.check import run_check

    checked = run_check(loaded, address=place.address, wait=place.wait)
    if as_json:
        click.echo(json.dumps(_as_json(checked), indent=1, allow_nan=False))
    else:
        for examination in checked.examinations:
            _print(examination)
        for figure in checked.figures:
            click.echo(f"figure: {figure}")
    if checked.is_refused and place.force:
        click.echo("a sweep refuses this model, and --force goes on", err=True)
    elif checked.is_refused:
        sys.exit(FAILED)


def _print(examination: Examination) -> None:
    """Print a table of readings, colour only on a terminal, then the findings."""
    from rich.console import Console
    from rich.table import Table

    from orchestrator.hosts.teacher.detectors import readings

    evidence, console = examination.evidence, Console(highlight=False)
    table = Table(title=f"Teacher, {examination.subject.label}", title_justify="left")
    for heading in ("detector", "measured", "value", "limits", "verdict"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for reading in readings(evidence):
        value = "—" if reading.value is None else f"{reading.value:.3g}"
        verdict = "" if reading.value is None else "good" if reading.finding is None else reading.finding.severity
        style = {"refused": "bold red", "noted": "yellow"}.get(verdict)
        table.add_row(reading.name, reading.quantity, value, reading.limit, verdict, style=style)
    console.print(table)
    earlier = ", measured earlier" if examination.stored else ""
    click.echo(
        f"{evidence.evaluations:.0f} evaluations of {evidence.samples} samples, {evidence.forwards} passes of the "
        f"network{earlier}"
    )
    for finding in examination.findings:
        click.echo(f"{finding.severity}: {finding}")


def _as_json(checked: Checked) -> dict[str, Any]:
    from orchestrator.hosts.teacher.detectors import readings

    return {
        "model": checked.facts.name,
        "refused": checked.is_refused,
        "figures": checked.figures,
        "examinations": [
            {
                "conditioning": dict(one.subject.conditioning),
                "guidance_scale": one.subject.guidance_scale,
                "evaluations": one.evidence.evaluations,
                "forwards": one.evidence.forwards,
                "readings": {
                    reading.name: reading.value if reading.value is None or math.isfinite(reading.value) else None
                    for reading in readings(one.evidence)
                },
                "findings": [finding._asdict() for finding in one.findings],
            }
            for one in checked.examinations
        ],
    }
