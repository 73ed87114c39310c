"""Commands that make what others take: theta for other programs and the registry, statistics of real images."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.shared import tracked
from orchestrator.errors import UserError

# Heavy imports (torch, ray, mlflow: seconds) stay inside the commands: --help and a typing error answer at once.


@click.command()
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
    from solvers.theta import load_theta

    try:
        artifact = load_theta(theta)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    for path in exporter.export(artifact, destination):
        click.echo(path)


@click.command()
@click.argument("theta", metavar="THETA")
@click.option("--name", required=True, help="Of the registered model; made where there is none.")
@click.option("--alias", help="Let this alias point to the new version, e.g. champion.")
@click.option("--experiment", default="registered", show_default=True, help="Where the run of a THETA file goes.")
@tracked
@click.option("--storage", metavar="ROOT", default="bespoke-data", show_default=True, help="Root that holds mlflow.db.")
def register(theta: str, name: str, alias: str | None, experiment: str, tracking_uri: str | None, storage: str) -> None:
    """Register THETA, a file or runs:/ID, as a version of a model in MLflow's registry.

    \b
    Examples:
      bespoke register bespoke-data/experiments/digits/thetas/bns-lm-nfe8.json --name digits-nfe8 --alias champion
      bespoke evaluate models:/digits-nfe8@champion --config sweeps/configs/digits.yaml
    """
    from orchestrator.storage import Storage
    from orchestrator.tracking.mlflow import THETA, THETA_FILE, Tracker, open_experiment
    from orchestrator.tracking.uri import resolve_tracking_uri
    from solvers.theta import load_theta

    uri = resolve_tracking_uri(tracking_uri, storage)
    if theta.startswith("runs:/"):
        tracker = Tracker(uri)
        _, run_id = tracker.read_theta(theta)
    else:
        try:
            artifact = load_theta(theta)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        tracker, experiment_id = open_experiment(uri, experiment, Storage.at(storage))
        log = tracker.run(experiment_id, f"theta/{artifact.family}/{artifact.digest}", Path(theta).stem)
        log.tags({THETA: artifact.digest})
        log.finish({"nfe": artifact.solver.nfe}, texts={THETA_FILE: artifact.to_json()})
        run_id = log.run_id
    version = tracker.register(name, run_id, alias)
    click.echo(f"models:/{name}/{version}" + (f" is now models:/{name}@{alias}" if alias else ""))


@click.command()
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

    from orchestrator.config.reading import parse_options
    from orchestrator.evaluation.real import reference_statistics
    from orchestrator.hosts.scorer import Scorer
    from orchestrator.hosts.settings import ScorerSettings
    from orchestrator.pool.requests import LocalPool
    from orchestrator.storage import Storage

    if to.suffix != ".safetensors":
        raise UserError(f"statistics are a .safetensors file, got --to {to}")
    place = Storage.at(storage)
    place.check_writable()
    scorers = LocalPool(Scorer(ScorerSettings(storage=place.root, device=device, batch_size=batch_size)))
    described = {"name": dataset, "options": parse_options(options)}
    moments = reference_statistics(place, scorers, features, {"weights": weights} if weights else {}, described, keep)
    Storage.at(to.absolute().parent).write(to.name, moments.to_bytes(dataset=dataset))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"{to}: {moments.count:,} images, {len(moments.mean)} features; peak memory {peak:,.0f} MiB")
