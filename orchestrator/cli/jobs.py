"""Commands that compute for long: pairs, sweeps, evaluations, training. Each is resumable."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.shared import FAILED, load, print_table, runs_hosts, tracked, with_options
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.experiment import ExperimentConfig

# Heavy imports (torch, ray, mlflow: seconds) stay inside the commands: --help and a typing error answer at once.


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
def pairs(config: str, overrides: tuple[str, ...], address: str, storage: str, no_wait: bool) -> None:
    """Make or resume the ground-truth pairs of CONFIG; damaged shards are made again.

    \b
    Examples:
      bespoke pairs sweeps/configs/digits.yaml
      bespoke pairs sweeps/configs/digits.yaml pairs.test=4096 --storage s3://bucket/bespoke
    """
    loaded = load(config, overrides, storage, None)
    from orchestrator.pairs import PairStore
    from sweeps.session import Session

    with Session(loaded, address=address, wait=not no_wait, tracked=False) as session:
        session.make_pairs()
        for (split, scale, seed), spec in session.specs.items():
            store = PairStore(session.storage, spec)
            records = store.records()
            mean = sum(record.nfe_sum for record in records) / spec.count
            click.echo(
                f"{split:<10} guidance {scale:g} seed {seed}: {spec.count} pairs in {len(records)} shards, "
                f"{mean:.0f} evaluations a pair, {session.storage.location(store.folder)}"
            )


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
@tracked
def sweep(
    config: str, overrides: tuple[str, ...], address: str, tracking_uri: str, storage: str, no_wait: bool
) -> None:
    """The main job: pairs, sweep, evaluation, MLflow and report of CONFIG. Resumable: run it again.

    \b
    Examples:
      bespoke sweep sweeps/configs/digits.yaml
      bespoke sweep sweeps/configs/digits.yaml nfe=[8] learned.0.iterations=15000
      bespoke sweep sweeps/configs/digits.yaml --address auto --storage s3://bucket/bespoke \\
              --tracking-uri http://head:5000
    """
    loaded = load(config, overrides, storage, tracking_uri)
    from sweeps.sweep import run_sweep

    outcome = run_sweep(loaded, address=address, wait=not no_wait)
    print_table(outcome.rows)
    click.echo(f"report: {outcome.report}")
    if outcome.thetas is not None:
        click.echo(f"thetas: {outcome.thetas}")
    for name, reason in outcome.failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if outcome.failed:
        sys.exit(FAILED)


@click.command()
@click.argument("thetas", nargs=-1, metavar="[THETA]...")
@click.option("--config", required=True, help="Whose model to use; its section 'evaluation' says on what.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--experiment", metavar="NAME", help="Also every learned theta that this experiment's table shows.")
@click.option("--allow-transfer", is_flag=True, help="Score theta also on another model than it was made for.")
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
    address: str,
    tracking_uri: str,
    storage: str,
    no_wait: bool,
) -> None:
    """Score THETA artifacts on datasets by metrics: tables, pictures, MLflow. Resumable: run it again.

    A THETA is a file, an MLflow run (runs:/ID) or a registered model (models:/NAME@ALIAS, models:/NAME/VERSION).
    What is scored on what, and by what, is the section 'evaluation' of the configuration; without one, the test pairs
    of the experiment by the metrics of its sweep. What was measured before is not measured again.

    \b
    Examples:
      bespoke evaluate theta.json --config sweeps/configs/digits.yaml
      bespoke evaluate --experiment digits --config sweeps/configs/digits.yaml
      bespoke evaluate models:/digits@champion --config sweeps/configs/digits.yaml \\
              --set evaluation.samples=50000 --set 'evaluation.baselines=[euler, midpoint]'
    """
    loaded = load(config, overrides, storage, tracking_uri)
    from sweeps.evaluate import check_evaluation, evaluate_thetas

    check_evaluation(loaded)
    found = _find_thetas(thetas, experiment, loaded)
    outcome = evaluate_thetas(loaded, found, address=address, wait=not no_wait, allow_transfer=allow_transfer)
    if as_json:
        from orchestrator.reports.tables import to_rows

        click.echo(json.dumps(to_rows(outcome.scores), indent=1))
    else:
        click.echo("\n".join(table.markdown() for table in outcome.tables))
        click.echo(f"report: {outcome.report}")
    for name, reason in outcome.failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if outcome.failed:
        sys.exit(FAILED)


def _find_thetas(thetas: Sequence[str], experiment: str | None, config: ExperimentConfig) -> list[Any]:
    """The theta of these names: files, MLflow runs, registered models, and those of an experiment."""
    from orchestrator.results.store import rows
    from orchestrator.tracking.mlflow import Tracker, check_readable
    from orchestrator.tracking.records import read_run
    from orchestrator.tracking.uri import resolve_tracking_uri
    from solvers.theta import ThetaArtifact, load_theta
    from sweeps.evaluate import FoundTheta

    if not thetas and experiment is None:
        raise UserError("nothing to evaluate: give files, runs:/ID, models:/NAME@ALIAS, or --experiment NAME")
    uri = resolve_tracking_uri(config.tracking_uri, config.storage)
    names = list(thetas)
    if experiment is not None or any(name.startswith(("runs:/", "models:/")) for name in thetas):
        check_readable(uri)
        tracker = Tracker(uri)
    if experiment is not None:
        runs = tracker.latest_trials(experiment)
        records = {read_run(run)[0].key: run for run in runs}
        table = rows(read_run(run)[0] for run in runs)
        names += [f"runs:/{records[row.keys[0]].info.run_id}" for row in table if row.kind == "learned"]
    found = []
    for name in names:
        if name.startswith(("runs:/", "models:/")):
            text, run_id = tracker.read_theta(name)
            found.append(FoundTheta(name, ThetaArtifact.from_json(text, origin=name), run_id))
            continue
        try:
            found.append(FoundTheta(name, load_theta(name)))
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    return found


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default=".", show_default=True, help="Folder for the weights and the model card.")
@tracked
def pretrain(config: str, overrides: tuple[str, ...], output: str, tracking_uri: str) -> None:
    """Train a zoo model, draw and judge its samples; goes on from its last checkpoint. Losses go to MLflow.

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
    # A run for each recipe: the same one goes on, another's parameters would contradict it.
    recipe = loaded.model_dump(mode="json", exclude=set(ELSEWHERE))
    run = tracker.run(experiment, f"pretrain/{digest_of(recipe)}", loaded.name)
    run.parameters(recipe)
    with bar(loaded.iterations, "iteration", loaded.name) as progress:

        def told(iteration: int, loss: float) -> None:
            progress.update(iteration - progress.n)
            progress.set_postfix_str(f" loss {loss:.4f}", refresh=False)

        try:
            facts = train(loaded, Path(output), told, lambda iteration, losses: run.metrics(losses, iteration))
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
    click.echo(f"samples to look at: {sheet}")
    click.echo(f"{weights}: held-out loss {facts['validation_loss']:.4f}, {facts['parameters']:,} parameters")


@click.command(name="distil-network")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@runs_hosts
@tracked
def distil_network(
    config: str, overrides: tuple[str, ...], address: str, tracking_uri: str, storage: str, no_wait: bool
) -> None:
    """Compare distilling the solver with distilling the network, on one zoo model. Resumable: run it again.

    Makes pairs, distils solvers, trains students (BST K.4 and Progressive Distillation) at the same NFEs, and samples
    all of them from the same fresh noise: PSNR, Frechet distance, passes spent, training set, parameters, bytes. The
    networks train in this process; with workers=N, or --address, as Ray tasks.

    \b
    Examples:
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml nfe=[8] progressive.iterations=4000
      bespoke distil-network sweeps/configs/network_distillation/digits.yaml workers=2
    """
    from orchestrator.network_distillation.config import load_network_config

    loaded = load_network_config(config, with_options(overrides, storage, tracking_uri))
    from sweeps.distil_network import run_comparison

    found = run_comparison(loaded, address=address, wait=not no_wait)
    click.echo(found.markdown)
    click.echo(f"table: {found.table}")
    click.echo(f"figure: {found.figure}")
