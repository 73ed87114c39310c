"""Commands that produce artifacts: exported and registered theta, statistics of real images."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.shared import stored, theta_file, tracked
from orchestrator.errors import UserError

# Imports of torch, ray and mlflow take seconds, so they stay inside the commands: --help and usage errors are instant.


@click.command()
@click.argument("theta", metavar="THETA")
@click.option("--to", "to", required=True, metavar="NAME", help="Output format, one of `bespoke list exporters`.")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DESTINATION")
@click.option(
    "--guidance-scale", type=float, metavar="SCALE", help="Export this scale alone, of a THETA for a range of scales."
)
def export(theta: str, to: str, destination: Path, guidance_scale: float | None) -> None:
    """Export a THETA artifact for use by another program. An existing file at DESTINATION is overwritten.

    \b
    Examples:
      bespoke export theta.json --to python sampler.py
      bespoke export theta.json --to safetensors theta.safetensors
      bespoke export theta.json --to python sampler.py --guidance-scale 2.5
    """
    from orchestrator import plugins

    exporter = plugins.load("exporters", to)()
    artifact = theta_file(theta)
    if guidance_scale is not None:
        artifact = artifact.at(guidance_scale=guidance_scale)
    for path in exporter.export(artifact, destination):
        click.echo(path)


@click.command()
@click.argument("theta", metavar="THETA")
@click.option("--name", required=True, help="Name of the registered model; created if it does not exist.")
@click.option("--alias", help="Alias to point at the new version, e.g. champion.")
@click.option(
    "--experiment", default="registered", show_default=True, help="MLflow experiment in which a THETA file is logged."
)
@tracked
@stored
def register(theta: str, name: str, alias: str | None, experiment: str, tracking_uri: str | None, storage: str) -> None:
    """Register THETA (a file or runs:/ID) as a new version of a model in the MLflow registry.

    \b
    Examples:
      bespoke register bespoke-data/experiments/digits/thetas/bns-lm-nfe8.json --name digits-nfe8 --alias champion
      bespoke evaluate models:/digits-nfe8@champion --config sweeps/configs/digits.yaml
    """
    from orchestrator.storage import Storage
    from orchestrator.tracking.mlflow import THETA, THETA_FILE, Tracker, open_experiment
    from orchestrator.tracking.uri import resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri, storage)
    if theta.startswith("runs:/"):
        tracker = Tracker.open(uri)
        _, run_id = tracker.read_theta(theta)
    else:
        artifact = theta_file(theta)
        tracker, experiment_id = open_experiment(uri, experiment, Storage.at(storage))
        log = tracker.run(experiment_id, f"theta/{artifact.family}/{artifact.digest}", Path(theta).stem)
        log.tags({THETA: artifact.digest})
        log.finish({"nfe": artifact.nfe}, texts={THETA_FILE: artifact.to_json()})
        run_id = log.run_id
    version = tracker.register(name, run_id, alias)
    click.echo(f"models:/{name}/{version}" + (f" is now models:/{name}@{alias}" if alias else ""))


@click.command()
@click.argument("dataset")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--features", default="inception", show_default=True, help="Feature extractor, one of `bespoke list features`."
)
@click.option("--weights", metavar="FILE", help="Weights of the extractor, if not in the default location.")
@click.option(
    "--to", "to", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Output .safetensors file."
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=4000,
    show_default=True,
    help="Number of samples whose features are stored, for KID.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per forward pass.")
@stored
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
    """Compute statistics of a DATASET's real samples for distances such as FID (option 'reference'). Resumable.

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
        raise UserError(f"--to must name a .safetensors file, got {to}")
    store = Storage.at(storage)
    store.check_writable()
    scorers = LocalPool(Scorer(ScorerSettings(storage=store.root, device=device, batch_size=batch_size)))
    dataset_config = {"name": dataset, "options": parse_options(options)}
    moments = reference_statistics(
        store, scorers, features, {"weights": weights} if weights else {}, dataset_config, keep
    )
    Storage.at(to.absolute().parent).write(to.name, moments.to_bytes(dataset=dataset))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"{to}: {moments.count:,} samples, {len(moments.mean)} features; peak memory {peak:,.0f} MiB")
