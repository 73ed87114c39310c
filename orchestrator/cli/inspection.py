"""Commands that inspect results, plugins, this machine, or a cluster file."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from orchestrator.cli.shared import FAILED, print_table, stored, tracked
from orchestrator.plugins import KINDS

# Imports of torch, ray and mlflow take seconds, so they stay inside the commands: --help and usage errors are instant.


@click.command()
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON row per solver instead of a table.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@tracked
@stored
def compare(experiment: str, as_json: bool, markdown: bool, tracking_uri: str | None, storage: str) -> None:
    """Compare the solvers of an MLflow EXPERIMENT: all trials of its sweeps on the newest model.

    \b
    Examples:
      bespoke compare digits
      bespoke compare digits --json | jq '.[] | select(.nfe == 8)'
    """
    from orchestrator.results.store import rows
    from orchestrator.tracking.mlflow import Tracker
    from orchestrator.tracking.records import read_run
    from orchestrator.tracking.uri import resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri, storage)
    trials = Tracker.open(uri).latest_trials(experiment)
    records = [read_run(run) for run in trials]
    table = rows(result for result, _ in records)
    if as_json:
        chosen = {key for row in table for key in row.keys}
        click.echo(json.dumps([_json_row(result, theta, result.key in chosen) for result, theta in records], indent=1))
    elif markdown:
        from orchestrator.reports.sweep import markdown_table

        click.echo(markdown_table(table))
    else:
        # A distillation compares on the pairs that have chosen its iterate, a sweep on fresh ones.
        print_table(table, pairs=next((run.data.params.get("pairs", "test") for run in trials), "test"))


def _json_row(result: Any, theta: str, selected: bool) -> dict[str, Any]:
    means = {column: summary["mean"] for column, summary in result.metrics.items()}
    return {
        "family": result.point["family"],
        "label": result.label,
        "kind": result.kind,
        "nfe": result.point["nfe"],
        "sigma0": result.point["sigma0"],
        "guidance_scale": result.point["guidance_scale"],
        "seed": result.point["seed"],
        "grid": result.grid,
        **means,
        "validation_psnr_db": result.validation_psnr_db,
        "start_psnr_db": result.start_metrics["psnr_db"]["mean"] if result.start_metrics else None,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "status": result.status,
        "selected": selected,
        "theta": theta,
    }


@click.command(name="list")
@click.argument("kind", type=click.Choice(sorted(KINDS)))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(kind: str, name: str | None, as_json: bool) -> None:
    """List what configurations can name: solver families, models, datasets, metrics and others, with their options.

    With NAME, one of them in full.

    \b
    Examples:
      bespoke list models
      bespoke list models torch_module
      bespoke list schedulers --json
    """
    from orchestrator.cli.listing import as_data, describe, describe_one

    if as_json:
        click.echo(json.dumps(as_data(kind, name), indent=1))
        return
    for line in describe(kind) if name is None else describe_one(kind, name):
        click.echo(line)


@click.command()
@tracked
@stored
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(tracking_uri: str | None, storage: str, port: int, host: str) -> None:
    """Open the MLflow UI on the curves of the newest sweep (stop it with Ctrl-C).

    Prints the address of these curves once the server answers, and opens it if this machine has a browser.

    \b
    Examples:
      bespoke ui
      bespoke ui --storage /data/bespoke --port 5001
    """
    from orchestrator.cli.ui import curves_path, serve
    from orchestrator.tracking.mlflow import Tracker
    from orchestrator.tracking.uri import resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri, storage)
    sys.exit(serve(uri, host, port, curves_path(Tracker.open(uri).newest_sweep_experiment())))


@click.command()
@stored
@tracked
@click.option(
    "--address", metavar="ADDR", help="Ray cluster to check node by node; default: check that Ray starts here."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(storage: str, tracking_uri: str | None, address: str | None, as_json: bool) -> None:
    """Check packages, cores, GPUs, Ray, storage, MLflow and weights, and say how to fix what is missing.

    \b
    Examples:
      bespoke doctor
      bespoke doctor --address auto --storage s3://bucket/bespoke --tracking-uri http://head:5000
    """
    from rich.console import Console

    from orchestrator.cli.doctor import as_dict, diagnose, table, works

    findings = list(diagnose(storage, tracking_uri, address))
    if as_json:
        click.echo(json.dumps(as_dict(findings), indent=1))
    else:
        Console(highlight=False).print(table(findings))
    sys.exit(0 if works(findings) else FAILED)


@click.group()
def cluster() -> None:
    """Work with clusters started by `ray up`."""


@cluster.command("check")
@click.argument("file", default="ray_cluster.yaml")
@click.option(
    "--config", "configs", multiple=True, metavar="CONFIG", help="Experiment that will run on the cluster; repeatable."
)
@click.option("--for-launch", is_flag=True, help="Also report placeholders left in the file and missing mounted files.")
def cluster_check(file: str, configs: tuple[str, ...], for_launch: bool) -> None:
    """Check a `ray up` FILE for version, limit, port and secret problems, without calling a cloud.

    FILE defaults to ray_cluster.yaml. The exit code is 1 if there are problems.

    \b
    Examples:
      bespoke cluster check
      bespoke cluster check ray_cluster.gcp.yaml --for-launch --config sweeps/configs/digits.yaml
    """
    from orchestrator.cluster.check import check_cluster_file
    from orchestrator.config.reading import load_config

    demands = {name: load_config(name).resources for name in configs}
    problems = check_cluster_file(file, demands=demands, for_launch=for_launch)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        sys.exit(FAILED)
    click.echo(f"{file}: no problems found")
