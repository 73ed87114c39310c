"""``bespoke distil``: one theta per NFE for one model, by the cheapest sound way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.shared import Place, runs_hosts, tracked, with_options

if TYPE_CHECKING:
    from sweeps.distil.run import Finished

# Imports of torch, ray and mlflow take seconds, so they stay inside the commands: --help and usage errors are instant.


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "N[,N…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number, or several with commas, such as 8 or 4,8", param, ctx)
        return numbers


class _Scale(click.ParamType[tuple[float, ...]]):
    """A guidance scale, or the two ends of a range with a colon."""

    name = "W|LOW:HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            ends = tuple(float(part) for part in str(value).split(":"))
        except ValueError:
            ends = ()
        if len(ends) not in (1, 2) or not all(map(math.isfinite, ends)):
            self.fail(f"{value!r} is not a guidance scale such as 3, or a range such as 1:5", param, ctx)
        return ends


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--nfe",
    type=_Numbers(),
    required=True,
    multiple=True,
    help="Evaluations per sample; one theta for each: 8, or 4,8.",
)
@click.option(
    "--guidance-scale", type=_Scale(), help="Guidance scale, or a range such as 1:5 that one theta serves. Default: 1."
)
@click.option(
    "--budget",
    type=click.IntRange(1),
    metavar="N",
    help="Velocity evaluations that everything may take. Default: until validation stops improving.",
)
@click.option(
    "--beginning",
    type=click.Choice(["auto", "held", "time", "free"]),
    default="auto",
    show_default=True,
    help="What is learned of the beginning: nothing, its time, or its time and scale; auto: all that exporters allow.",
)
@click.option("--seed", type=click.IntRange(0, 999), default=0, show_default=True, help="Seed of pairs and batches.")
@click.option("--name", metavar="NAME", help="Name of the experiment; default: that of the file or the model.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for a copy of the theta files, the tables and the report.",
)
@runs_hosts
@tracked
def distil(
    model: str,
    overrides: tuple[str, ...],
    nfe: tuple[tuple[int, ...], ...],
    guidance_scale: tuple[float, ...] | None,
    budget: int | None,
    beginning: Any,
    seed: int,
    name: str | None,
    output: Path | None,
    place: Place,
) -> None:
    """Distil a solver for MODEL at the least cost: few pairs, a short race for the start, then Levenberg-Marquardt.

    MODEL is a model of the zoo, or a YAML file: an experiment, of which only the model counts, or nothing but `model:`
    (and `conditioning:`). An evaluation is timed first, and what the whole will take is printed before it begins. The
    model runs in this process; with --address, on hosts of a Ray cluster. To resume, run the same command again.

    \b
    It leaves in the storage, under experiments/NAME/distil:
      NAME-nfe8.json             theta, for `solvers.load_theta`, `bespoke export` and `bespoke evaluate`
      report.html                theta beside the best fixed solver: PSNR, samples, its numbers, the bill
      table.md, table.json       the same as text
    and runs in MLflow, which `bespoke compare NAME` and `bespoke ui` show.

    \b
    Examples:
      bespoke distil digits_fm_ot --nfe 8
      bespoke distil cifar10_gray16_fm_ot --nfe 4,8 --budget 30000 --output my-thetas
      bespoke distil digits_eps_vp --nfe 8 --guidance-scale 1:5
      bespoke distil my_model.yaml --nfe 8 resources.device=cuda resources.host_gpus=1
      bespoke distil my_model.yaml --nfe 8 --address auto --storage s3://bucket/bespoke \\
              --tracking-uri http://head:5000
    """
    from orchestrator.config.single_model import load_single_model
    from sweeps.distil.settings import DistilSettings

    nfes = tuple(dict.fromkeys(number for numbers in nfe for number in numbers))
    config = load_single_model(
        model, with_options(overrides, place), nfe=nfes, guidance_scale=guidance_scale or (), name=name
    )
    scales = config.guidance_scale if guidance_scale is None else guidance_scale
    if guidance_scale is None and len(scales) > 1:
        listed = ", ".join(f"{scale:g}" for scale in scales)
        raise click.UsageError(
            f"{model} lists the guidance scales {listed}; choose one with --guidance-scale {scales[0]:g}, or a range "
            f"that one theta serves with --guidance-scale {min(scales):g}:{max(scales):g}"
        )
    settings = DistilSettings(
        nfe=nfes,
        guidance_scale=(scales[0], scales[1]) if len(scales) == 2 else scales[0],
        budget=budget,
        beginning=beginning,
        seed=seed,
    )
    from sweeps.distil.run import run_distil

    _print(run_distil(config, settings, address=place.address, wait=place.wait, force=place.force, output=output))


def _print(finished: Finished) -> None:
    """Print what came out, what it cost, where it is, and how theta is used."""
    from rich.console import Console
    from rich.table import Table

    from orchestrator.metrics.base import shown_db

    table = Table(title="PSNR on the validation pairs", title_justify="left")
    for heading in ("NFE", "theta (dB)", "best fixed solver (dB)", "gain (dB)", "evaluations"):
        table.add_column(heading, justify="right")
    for one in finished.learned:
        fixed = f"{shown_db(one.fixed_psnr_db, 2)} ({one.fixed_name})"
        gain = f"{one.psnr_db - one.fixed_psnr_db:+.2f}"
        table.add_row(str(one.nfe), f"[bold]{shown_db(one.psnr_db, 2)}[/]", fixed, gain, f"{one.evaluations:,}")
    Console(highlight=False).print(table)
    for one in finished.learned:
        for sentence in filter(None, [one.scales_sentence(), *one.notes]):
            click.echo(f"NFE {one.nfe}: {sentence}")
    for scale, truth in finished.outcome.truths.items():
        click.echo(f"ground truth, guidance {scale:g}: {truth.sentence()}")
    click.echo(f"cost: {finished.outcome.bill.sentence()}")
    for location in finished.thetas.values():
        click.echo(f"theta: {location}")
    click.echo(f"report: {finished.report}")
    first, location = finished.learned[0], next(iter(finished.thetas.values()))
    ranged = first.theta.guidance_range
    at = "" if ranged is None else f".at(guidance_scale={sum(ranged) / 2:g})"
    click.echo(
        f"\nIn Python, with your model as velocity(x, t) and x0 of noise:\n"
        f'  theta = solvers.load_theta("{location}"){at}\n'
        f"  samples = theta.solver.sample(velocity, x0)\n"
        f"For other programs:\n"
        f"  bespoke export {location} --to python sampler.py"
    )
