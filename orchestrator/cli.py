"""The command ``bespoke``: the composition root, and the one module here that may import sweeps.

Exit codes: 0 done; 1 the work ended with failures; 2 what the user gave cannot work; 130 interrupted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config import ExperimentConfig
    from orchestrator.results import Row

# Heavy imports (torch, ray, mlflow: seconds) stay inside the commands: --help and a typing error answer at once.

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class _Group(click.Group):
    """Prints errors that a user can mend without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from solvers.ns import InvalidThetaError

        try:
            return super().invoke(ctx)
        except (UserError, InvalidThetaError) as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(USAGE)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from here", err=True)
            ctx.exit(INTERRUPTED)


def _runs_hosts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that starts hosts."""
    for option in (
        click.option("--no-wait", is_flag=True, help="Fail at once where another process uses the same store."),
        click.option("--storage", metavar="ROOT", help="Root of pairs and results: a path, s3://… or gs://…"),
        click.option("--address", metavar="ADDR", help="Ray cluster ('auto', host:port); default: a local Ray."),
    ):
        command = option(command)
    return command


_tracked = click.option("--tracking-uri", metavar="URI", help="MLflow store; default: SQLite under the storage root.")


def _with_options(overrides: Sequence[str], storage: str | None, tracking_uri: str | None) -> list[str]:
    """Overrides with the options that stand for some: what is typed last wins."""
    given = [
        f"{key}={json.dumps(value)}" for key, value in (("storage", storage), ("tracking_uri", tracking_uri)) if value
    ]
    return [*overrides, *given]


def _config(path: str, overrides: Sequence[str], storage: str | None, tracking_uri: str | None) -> ExperimentConfig:
    from orchestrator.config import load_config

    return load_config(path, _with_options(overrides, storage, tracking_uri))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="bespoke-solvers", prog_name="bespoke")
def main() -> None:
    """Distil fast solvers for frozen diffusion and flow models.

    \b
    Start here:
      bespoke sweep sweeps/configs/digits.yaml     pairs, sweep, evaluation, report
      bespoke ui                                   look at it in MLflow
      bespoke compare digits                       the table again
    """


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_runs_hosts
def pairs(config: str, overrides: tuple[str, ...], address: str, storage: str, no_wait: bool) -> None:
    """Make or resume the ground-truth pairs of CONFIG; damaged shards are made again.

    \b
    Examples:
      bespoke pairs sweeps/configs/digits.yaml
      bespoke pairs sweeps/configs/digits.yaml pairs.test=4096 --storage s3://bucket/bespoke
    """
    loaded = _config(config, overrides, storage, None)
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


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_runs_hosts
@_tracked
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
    loaded = _config(config, overrides, storage, tracking_uri)
    from sweeps.run import run_sweep

    outcome = run_sweep(loaded, address=address, wait=not no_wait)
    _print_table(outcome.rows)
    click.echo(f"report: {outcome.report}")
    if outcome.thetas is not None:
        click.echo(f"thetas: {outcome.thetas}")
    for name, reason in outcome.failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if outcome.failed:
        sys.exit(FAILED)


@main.command()
@click.argument("thetas", nargs=-1, metavar="[THETA]...")
@click.option("--config", required=True, help="Whose model to use; its section 'evaluation' says on what.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--experiment", metavar="NAME", help="Also every learned theta that this experiment's table shows.")
@click.option("--allow-transfer", is_flag=True, help="Score theta also on another model than it was made for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@_runs_hosts
@_tracked
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
    loaded = _config(config, overrides, storage, tracking_uri)
    from sweeps.evaluation import check_evaluation, evaluate_thetas

    check_evaluation(loaded)
    found = _find_thetas(thetas, experiment, loaded)
    outcome = evaluate_thetas(loaded, found, address=address, wait=not no_wait, allow_transfer=allow_transfer)
    if as_json:
        from orchestrator.evaluation.tables import to_rows

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
    from orchestrator.config import resolve_tracking_uri
    from orchestrator.results import rows
    from orchestrator.run_records import read_run
    from orchestrator.tracking import Tracker, check_readable
    from solvers.ns import ThetaArtifact
    from sweeps.evaluation import FoundTheta

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
            found.append(FoundTheta(name, ThetaArtifact.load(name)))
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    return found


@main.command()
@click.argument("dataset")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--features", default="inception", show_default=True, help="`bespoke list features` shows them.")
@click.option("--weights", metavar="FILE", help="Weights of the features' network, where they are not in their place.")
@click.option("--to", "to", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .safetensors file.")
@click.option("--keep", default=4000, show_default=True, help="Samples whose features are kept too, for KID.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--batch-size", default=64, show_default=True, help="Images that go through the network at once.")
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Where features are kept.")
def reference(
    dataset: str,
    options: tuple[str, ...],
    features: str,
    weights: str | None,
    to: Path,
    keep: int,
    device: str,
    batch_size: int,
    storage: str,
) -> None:
    """Statistics of a DATASET's real images, for FID and KID: option 'reference' of those metrics. Resumable.

    \b
    Examples:
      bespoke reference cifar10 folder=/data/cifar10 --features inception --to cifar10.safetensors
      bespoke reference image_folder folder=/data/cats side=256 --to cats.safetensors --device cuda
    """
    import resource

    from orchestrator.config import parse_options
    from orchestrator.evaluation.real import reference_statistics
    from orchestrator.pool import LocalPool
    from orchestrator.scorer import ScorerSettings
    from orchestrator.storage import Storage

    if to.suffix != ".safetensors":
        raise UserError(f"statistics are a .safetensors file, got --to {to}")
    place = Storage.at(storage)
    place.check_writable()
    scorers = LocalPool(ScorerSettings(storage=place.root, device=device, batch_size=batch_size))
    described = {"name": dataset, "options": parse_options(options)}
    moments = reference_statistics(place, scorers, features, {"weights": weights} if weights else {}, described, keep)
    Storage.at(to.absolute().parent).write(to.name, moments.to_bytes(dataset=dataset))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"{to}: {moments.count:,} images, {len(moments.mean)} features; peak memory {peak:,.0f} MiB")


@main.command()
@click.argument("theta", metavar="THETA")
@click.option("--name", required=True, help="Of the registered model; made where there is none.")
@click.option("--alias", help="Let this alias point to the new version, e.g. champion.")
@click.option("--experiment", default="registered", show_default=True, help="Where the run of a THETA file goes.")
@_tracked
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Root that holds mlflow.db.")
def register(theta: str, name: str, alias: str | None, experiment: str, tracking_uri: str | None, storage: str) -> None:
    """Register THETA, a file or runs:/ID, as a version of a model in MLflow's registry.

    \b
    Examples:
      bespoke register bespoke-data/experiments/digits/thetas/bns-lm-nfe8.json --name digits-nfe8 --alias champion
      bespoke evaluate models:/digits-nfe8@champion --config sweeps/configs/digits.yaml
    """
    from orchestrator.config import resolve_tracking_uri
    from orchestrator.storage import Storage
    from orchestrator.tracking import THETA, THETA_FILE, Tracker, open_experiment
    from solvers.ns import ThetaArtifact

    uri = resolve_tracking_uri(tracking_uri, storage)
    if theta.startswith("runs:/"):
        tracker = Tracker(uri)
        _, run_id = tracker.read_theta(theta)
    else:
        try:
            artifact = ThetaArtifact.load(theta)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        tracker, experiment_id = open_experiment(uri, experiment, Storage.at(storage))
        log = tracker.run(experiment_id, f"theta/{artifact.family}/{artifact.digest}", Path(theta).stem)
        log.tags({THETA: artifact.digest})
        log.finish({"nfe": artifact.solver.nfe}, texts={THETA_FILE: artifact.to_json()})
        run_id = log.run_id
    version = tracker.register(name, run_id, alias)
    click.echo(f"models:/{name}/{version}" + (f" is now models:/{name}@{alias}" if alias else ""))


@main.command()
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON row per solver instead of a table.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@_tracked
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Root that holds mlflow.db.")
def compare(experiment: str, as_json: bool, markdown: bool, tracking_uri: str | None, storage: str) -> None:
    """Compare the solvers of an EXPERIMENT by name, from MLflow: all that its sweeps have tried on the newest model.

    \b
    Examples:
      bespoke compare digits
      bespoke compare digits --json | jq '.[] | select(.nfe == 8)'
    """
    from orchestrator.config import resolve_tracking_uri
    from orchestrator.results import rows
    from orchestrator.run_records import read_run
    from orchestrator.tracking import Tracker, check_readable

    uri = resolve_tracking_uri(tracking_uri, storage)
    check_readable(uri)
    records = [read_run(run) for run in Tracker(uri).latest_trials(experiment)]
    table = rows(result for result, _ in records)
    if as_json:
        chosen = {key for row in table for key in row.keys}
        click.echo(json.dumps([_json_row(result, theta, result.key in chosen) for result, theta in records], indent=1))
    elif markdown:
        from orchestrator.report import markdown_table

        click.echo(markdown_table(table))
    else:
        _print_table(table)


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


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default=".", show_default=True, help="Folder for the weights and the model card.")
@_tracked
def pretrain(config: str, overrides: tuple[str, ...], output: str, tracking_uri: str) -> None:
    """Train a zoo model, draw and judge its samples; goes on from its last checkpoint. Losses go to MLflow.

    \b
    Examples:
      bespoke pretrain sweeps/configs/pretrain/digits_fm_ot.yaml --output my-models
      bespoke pretrain sweeps/configs/pretrain/cifar10_fm_ot.yaml dataset.options.folder=/data/cifar10
    """
    from orchestrator.config import read_yaml, resolve_tracking_uri, validated
    from orchestrator.errors import ConfigError
    from orchestrator.models.zoo.judge import write_judgement
    from orchestrator.models.zoo.sheet import write_sheet
    from orchestrator.models.zoo.training import ELSEWHERE, PretrainConfig, train
    from orchestrator.progress import bar
    from orchestrator.storage import Storage, digest_of
    from orchestrator.tracking import open_experiment

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
    if judged := write_judgement(weights):
        click.echo(judged)
    for path in (sheet, weights.with_suffix(".md")):
        run.file(path)
    run.finish({})
    click.echo(f"samples to look at: {sheet}")
    click.echo(f"{weights}: held-out loss {facts['validation_loss']:.4f}, {facts['parameters']:,} parameters")


@main.command(name="distil-network")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_runs_hosts
@_tracked
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

    loaded = load_network_config(config, _with_options(overrides, storage, tracking_uri))
    from sweeps.network_distillation import run_comparison

    found = run_comparison(loaded, address=address, wait=not no_wait)
    click.echo(found.markdown)
    click.echo(f"table: {found.table}")
    click.echo(f"figure: {found.figure}")


@main.command()
@click.argument("theta", metavar="THETA")
@click.option("--to", "to", required=True, metavar="NAME", help="The format; `bespoke list exporters` shows them.")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DESTINATION")
def export(theta: str, to: str, destination: Path) -> None:
    """Write a THETA artifact in the form that another program reads. A file at DESTINATION is replaced.

    \b
    Examples:
      bespoke export theta.json --to python sampler.py
      bespoke export theta.json --to safetensors theta.safetensors
    """
    from orchestrator import plugins

    exporter = plugins.load("exporters", to)()
    from orchestrator.export.safetensors import load_theta

    try:
        artifact = load_theta(theta)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    for path in exporter.export(artifact, destination):
        click.echo(path)


@main.command(name="list")
@click.argument(
    "kind",
    type=click.Choice(
        [
            "families",
            "models",
            "datasets",
            "metrics",
            "objectives",
            "features",
            "decoders",
            "recognisers",
            "speaker_encoders",
            "schedulers",
            "exporters",
        ]
    ),
)
def list_plugins(kind: str) -> None:
    """List what configurations can name: solver families, models, datasets, metrics, objectives and so on."""
    from orchestrator.listing import describe

    for line in describe(kind):
        click.echo(line)


@main.command()
@_tracked
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Root that holds mlflow.db.")
@click.option("--port", default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(tracking_uri: str | None, storage: str, port: int, host: str) -> None:
    """Open MLflow's UI on the right store (Ctrl-C ends it)."""
    from orchestrator.config import resolve_tracking_uri
    from orchestrator.tracking import check_readable

    uri = resolve_tracking_uri(tracking_uri, storage)
    check_readable(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port), "--host", host]
    sys.exit(subprocess.call(command))


@main.command()
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Root to try.")
@_tracked
@click.option("--address", metavar="ADDR", help="Ray cluster to look at, node by node; default: can Ray start here?")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(storage: str, tracking_uri: str | None, address: str | None, as_json: bool) -> None:
    """What is there, what is missing, what to do: packages, cores, GPUs, Ray, storage, MLflow, weights.

    \b
    Examples:
      bespoke doctor
      bespoke doctor --address auto --storage s3://bucket/bespoke --tracking-uri http://head:5000
    """
    from rich.console import Console

    from orchestrator.doctor import as_dict, diagnose, table, works

    findings = list(diagnose(storage, tracking_uri, address))
    if as_json:
        click.echo(json.dumps(as_dict(findings), indent=1))
    else:
        Console(highlight=False).print(table(findings))
    sys.exit(0 if works(findings) else FAILED)


@main.group()
def cluster() -> None:
    """Clusters that `ray up` starts."""


@cluster.command("check")
@click.argument("file", default="ray_cluster.yaml")
@click.option("--config", "configs", multiple=True, metavar="CONFIG", help="An experiment that is to run there.")
@click.option("--for-launch", is_flag=True, help="Also report values still to be filled in, and files to be mounted.")
def cluster_check(file: str, configs: tuple[str, ...], for_launch: bool) -> None:
    """Find what is wrong with a `ray up` FILE without calling a cloud: versions, limits, open ports, secrets.

    FILE is ray_cluster.yaml unless another is named. The exit code is 1 where there are problems.

    \b
    Examples:
      bespoke cluster check
      bespoke cluster check ray_cluster.gcp.yaml --for-launch --config sweeps/configs/digits.yaml
    """
    from orchestrator.cluster_check import Demand, check_cluster_file

    demands = []
    for name in configs:
        asked = _config(name, (), None, None).resources
        demands.append(
            Demand(
                name=name,
                hosts=asked.hosts,
                host_cpus=asked.host_cpus,
                host_gpus=asked.host_gpus,
                trial_cpus=asked.trial_cpus,
            )
        )
    problems = check_cluster_file(file, demands=demands, for_launch=for_launch)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        sys.exit(FAILED)
    click.echo(f"{file}: no problems found")


def _print_table(table: Sequence[Row]) -> None:
    """PSNR by solver and NFE; colours only on a terminal."""
    from rich.console import Console
    from rich.table import Table

    from orchestrator.report import not_finite, summary

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
            shown.add_row(line["title"], *cells, style="bold" if line["kind"] == "learned" else None)
        console.print(shown)


if __name__ == "__main__":
    main()
