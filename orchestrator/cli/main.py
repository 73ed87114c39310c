"""The ``bespoke`` command, assembled from the commands of ``orchestrator.cli``.

Exit codes: 0 success; 1 finished with failures; 2 invalid input or environment; 3 an unexpected error; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from itertools import pairwise
from typing import Any

import click

from orchestrator.cli.artifacts import export, reference, register
from orchestrator.cli.check import check
from orchestrator.cli.distil import distil
from orchestrator.cli.inspection import cluster, compare, doctor, list_plugins, ui
from orchestrator.cli.jobs import distil_network, evaluate, pairs, pretrain, sweep
from orchestrator.cli.shared import INTERRUPTED, UNEXPECTED, USAGE
from orchestrator.cli.store import store
from orchestrator.errors import UserError, describe, describe_outside, may_pass
from orchestrator.outside import unanswered


class _Group(click.Group):
    """Prints errors in a line, without a traceback unless ``--debug`` is given; refuses empty options by name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for before, argument in pairwise(["", *args]):
            option, equals, value = argument.partition("=")
            if not argument or (option.startswith("--") and equals and not value):
                name = option or (before if before.startswith("-") else "an argument")
                raise click.UsageError(
                    f"{name} is empty, as a variable is that is not set; give a value, or leave it out"
                )
        return super().parse_args(ctx, args)

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)
        except SystemExit as ended:
            if unanswered():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(ended.code if isinstance(ended.code, int) else 0)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        from solvers.ns import InvalidThetaError

        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            # Ray takes a second or two at exit to end its processes. A second Ctrl-C must not leave any behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            click.echo("interrupted; run the same command again to resume", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            from orchestrator.log import debugging

            if debugging():
                click.echo((isinstance(error, UserError) and error.details) or traceback.format_exc(), err=True)
            if isinstance(error, UserError | InvalidThetaError):
                click.echo(f"error: {error}", err=True)
                ctx.exit(USAGE)
            if may_pass(error):
                click.echo(f"error: {describe_outside(error)}; --debug shows the traceback", err=True)
                ctx.exit(USAGE)
            click.echo(f"error: unexpected {describe(error)}; --debug shows the traceback", err=True)
            ctx.exit(UNEXPECTED)


def _debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from orchestrator.log import show_debug

        show_debug()


_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_debug,
    help="Show tracebacks, and what Ray and MLflow print.",
)


@_debug_option
@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="bespoke-solvers", prog_name="bespoke")
def main() -> None:
    """Distil fast solvers for frozen diffusion and flow models.

    \b
    Start here:
      bespoke distil digits_fm_ot --nfe 8          one solver, now
      bespoke check sweeps/configs/digits.yaml     look at the model first
      bespoke sweep sweeps/configs/digits.yaml     pairs, sweep, evaluation, report
      bespoke ui                                   browse the results in MLflow
      bespoke compare digits                       print the table again
    """


for _command in (
    *(check, distil, pairs, sweep, evaluate, reference, register, compare, pretrain, distil_network),
    *(export, list_plugins, ui, store, doctor, cluster),
):
    for _inner in (_command, *(_command.commands.values() if isinstance(_command, click.Group) else ())):
        _debug_option(_inner)
    main.add_command(_command)


if __name__ == "__main__":
    main()
