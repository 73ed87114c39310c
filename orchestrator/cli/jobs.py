"""Long-running commands: pairs, sweeps, evaluations, training. All of them can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.shared import (
    Place,
    exit_if_failed,
    load,
    print_table,
    runs_hosts,
    theta_file,
    tracked,
    with_options,
)
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.experiment import ExperimentConfig

# Imports of torch, ray and mlflow take seconds, so they stay inside the commands: --help and usage errors are instant.


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
def pairs(config: str, overrides: tuple[str, ...], place: Place) -> None:
    """Make the ground-truth pairs of CONFIG, or resume making them. Damaged shards are replaced.

    \b
    Examples:
      bespoke pairs sweeps/configs/digits.yaml
      bespoke pairs sweeps/configs/digits.yaml pairs.test=4096 --storage s3://bucket/bespoke
    """
    loaded = load(config, overrides, place)
    from orchestrator.pairs import PairStore
    from orchestrator.progress import counted
    from sweeps.ray_session import RaySession

    with RaySession(
        loaded, address=place.address, wait=place.wait, force=place.force, tracked=False, command="pairs"
    ) as session:
        session.make_pairs(session.specs.values())
        session.record_needs([f"pairs/{spec.digest}" for spec in session.specs.values()], add=False)
        for (split, scale, seed), spec in session.specs.items():
            store = PairStore(session.storage, spec)
            records = store.records()
            mean = store.evaluations() / spec.count
            click.echo(
                f"{split:<10} guidance {scale:g} seed {seed}: {counted(spec.count, 'pair')} in "
                f"{counted(len(records), 'shard')}, {mean:.0f} evaluations per pair, "
                f"{session.storage.location(store.folder)}"
            )


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
@tracked
def sweep(config: str, overrides: tuple[str, ...], place: Place) -> None:
    """Run the main job of CONFIG: pairs, sweep, evaluation, MLflow and report. To resume, run it again.

    \b
    Examples:
      bespoke sweep sweeps/configs/digits.yaml
      bespoke sweep sweeps/configs/digits.yaml nfe=[8] learned.0.iterations=15000
      bespoke sweep sweeps/configs/digits.yaml --address auto --storage s3://bucket/bespoke \\
              --tracking-uri http://head:5000
    """
    loaded = load(config, overrides, place)
    from sweeps.sweep import run_sweep

    outcome = run_sweep(loaded, address=place.address, wait=place.wait, force=place.force)
    print_table(outcome.rows, outcome.truths)
    for scale, truth in outcome.truths.items():
        click.echo(f"ground truth, guidance {scale:g}: {truth.sentence()}")
    click.echo(f"cost: {outcome.bill.sentence()}")
    click.echo(f"report: {outcome.report}")
    if outcome.thetas is not None:
        click.echo(f"thetas: {outcome.thetas}")
    exit_if_failed(outcome.failed, outcome.log)


@click.command()
@click.argument("thetas", nargs=-1, metavar="[THETA]...")
@click.option(
    "--config",
    required=True,
    help="Experiment that names the model, and the datasets and metrics (section 'evaluation').",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration; repeatable."
)
@click.option("--experiment", metavar="NAME", help="Also score every learned theta in this experiment's table.")
@click.option("--allow-transfer", is_flag=True, help="Allow theta made for another model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@runs_hosts
@tracked
def evaluate(
    thetas: tuple[str, ...],
    config: str,
    overrides: tuple[str, ...],
    experiment: str | None,
    allow_transfer: bool,
    as_json: bool,
    place: Place,
) -> None:
    """Score THETA artifacts with metrics on datasets: tables, pictures, MLflow. To resume, run it again.

    A THETA is a file, an MLflow run (runs:/ID) or a registered model (models:/NAME@ALIAS, models:/NAME/VERSION). The
    section 'evaluation' of the configuration sets datasets, metrics and baselines; without it, the metrics of the
    sweep are measured on the experiment's test pairs. Values measured earlier are reused.

    \b
    Examples:
      bespoke evaluate theta.json --config sweeps/configs/digits.yaml
      bespoke evaluate --experiment digits --config sweeps/configs/digits.yaml
      bespoke evaluate models:/digits@champion --config sweeps/configs/digits.yaml \\
              --set evaluation.samples=50000 --set 'evaluation.baselines=[euler, midpoint]'
    """
    loaded = load(config, overrides, place)
    from orchestrator.evaluation.check import check_evaluation
    from sweeps.evaluate import evaluate_thetas

    check_evaluation(loaded)
    artifacts = _find_thetas(thetas, experiment, loaded)
    outcome = evaluate_thetas(
        loaded,
        artifacts,
        address=place.address,
        wait=place.wait,
        force=place.force,
        allow_transfer=allow_transfer,
    )
    if as_json:
        from orchestrator.reports.tables import to_rows

        click.echo(json.dumps([_finite(row) for row in to_rows(outcome.scores)], indent=1, allow_nan=False))
    else:
        click.echo("\n".join(table.markdown() for table in outcome.tables))
        click.echo(f"report: {outcome.report}")
    exit_if_failed(outcome.failed, outcome.log)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row with null for numbers that are missing or infinite, which JSON cannot represent."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _find_thetas(thetas: Sequence[str], experiment: str | None, config: ExperimentConfig) -> list[Any]:
    """Load theta from files, MLflow runs and registered models, and the learned ones of an experiment."""
    from orchestrator.results.store import rows
    from orchestrator.tracking.mlflow import Tracker
    from orchestrator.tracking.records import read_run
    from orchestrator.tracking.uri import resolve_tracking_uri
    from solvers.theta import ThetaArtifact
    from sweeps.evaluate import FoundTheta

    if not thetas and experiment is None:
        raise UserError("nothing to evaluate: give files, runs:/ID, models:/NAME@ALIAS, or --experiment NAME")
    uri = resolve_tracking_uri(config.tracking_uri, config.storage)
    names = list(thetas)
    if experiment is not None or any(name.startswith(("runs:/", "models:/")) for name in thetas):
        tracker = Tracker.open(uri)
    if experiment is not None:
        runs = [(read_run(run)[0], run.info.run_id) for run in tracker.latest_trials(experiment)]
        run_ids = {result.key: run_id for result, run_id in runs}
        table = rows(result for result, _ in runs)
        names += [f"runs:/{run_ids[row.keys[0]]}" for row in table if row.kind == "learned"]
    artifacts = []
    for name in names:
        if name.startswith(("runs:/", "models:/")):
            text, run_id = tracker.read_theta(name)
            artifacts.append(FoundTheta(name, ThetaArtifact.from_json(text, origin=name), run_id))
        else:
            artifacts.append(FoundTheta(name, theta_file(name)))
    return artifacts


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default=".", show_default=True, help="Output folder for the weights and the model card.")
@tracked
def pretrain(config: str, overrides: tuple[str, ...], output: str, tracking_uri: str | None) -> None:
    """Train a zoo model, then draw and score samples. Resumes from the last checkpoint; logs losses to MLflow.

    \b
    Examples:
      bespoke pretrain sweeps/configs/pretrain/digits_fm_ot.yaml --output my-models
      bespoke pretrain sweeps/configs/pretrain/cifar10_fm_ot.yaml dataset.options.folder=/data/cifar10
    """
    from orchestrator.config.reading import read_yaml, validated
    from orchestrator.errors import ConfigError
    from orchestrator.progress import bar
    from orchestrator.storage import Storage, digest_of
    from orchestrator.tracking.mlflow import open_experiment
    from orchestrator.tracking.uri import resolve_tracking_uri
    from orchestrator.training.scores import write_scores
    from orchestrator.training.sheet import write_sheet
    from orchestrator.training.zoo import ELSEWHERE, PretrainConfig, train

    loaded = validated(PretrainConfig, read_yaml(config, overrides), config)
    uri = resolve_tracking_uri(tracking_uri, loaded.storage)
    tracker, experiment = open_experiment(uri, "pretrain", Storage.at(loaded.storage))
    # One run per recipe: the same recipe resumes its run, and another's parameters would conflict with it.
    recipe = loaded.model_dump(mode="json", exclude=set(ELSEWHERE))
    run = tracker.run(experiment, f"pretrain/{digest_of(recipe)}", loaded.name)
    run.parameters(recipe)
    with bar(loaded.iterations, "iteration", loaded.name) as progress:

        def report(iteration: int, loss: float) -> None:
            progress.update(iteration - progress.n)
            progress.set_postfix_str(f" loss {loss:.4f}", refresh=False)

        try:
            facts = train(loaded, Path(output), report, lambda iteration, losses: run.metrics(losses, iteration))
        except ConfigError:
            run.finish({}, status="FAILED")
            raise
    weights = Path(output) / f"{loaded.name}.safetensors"
    sheet = write_sheet(weights)
    if scores := write_scores(weights):
        click.echo(scores)
    for path in (sheet, weights.with_suffix(".md")):
        run.file(path)
    run.finish({})
    click.echo(f"sample sheet: {sheet}")
    click.echo(f"{weights}: held-out loss {facts['validation_loss']:.4f}, {facts['parameters']:,} parameters")


@click.command(name="distil-network")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
@tracked
def distil_network(config: str, overrides: tuple[str, ...], place: Place) -> None:
    """Compare distilling the solver with distilling the network, on one zoo model. To resume, run it again.

    Makes pairs, distils solvers, trains student networks (BST K.4 and Progressive Distillation) at the same NFEs, and
    samples all of them from the same fresh noise. Reports PSNR, Frechet distance, network passes spent, training set,
    parameters and bytes. The networks are trained in this process, or as Ray tasks with workers=N or --address.

    \b
    Examples:
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml nfe=[8] progressive.iterations=4000
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml workers=2
    """
    from orchestrator.network_distillation.config import load_network_config

    loaded = load_network_config(config, with_options(overrides, place))
    from sweeps.distil_network import run_comparison

    comparison = run_comparison(loaded, address=place.address, wait=place.wait, force=place.force)
    click.echo(comparison.markdown)
    click.echo(f"table: {comparison.table}")
    click.echo(f"figure: {comparison.figure}")
