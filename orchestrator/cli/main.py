"""The command ``bespoke``: the commands of ``orchestrator.cli`` put together.

Exit codes: 0 done; 1 the work ended with failures; 2 what the user gave cannot work; 130 interrupted.
"""

from __future__ import annotations

import signal
from typing import Any

import click

from orchestrator.cli.artifacts import export, reference, register
from orchestrator.cli.inspection import cluster, compare, doctor, list_plugins, ui
from orchestrator.cli.jobs import distil_network, evaluate, pairs, pretrain, sweep
from orchestrator.cli.shared import INTERRUPTED, USAGE
from orchestrator.errors import UserError


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
            # Ray ends its processes at exit, in a second or two: whoever is impatient must not leave some behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            click.echo("interrupted; the same command goes on from here", err=True)
            ctx.exit(INTERRUPTED)


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


for _command in (
    *(pairs, sweep, evaluate, reference, register, compare, pretrain, distil_network),
    *(export, list_plugins, ui, doctor, cluster),
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
