"""The ``bespoke`` command, assembled from the commands of ``orchestrator.cli``.

Exit codes: 0 success; 1 finished with failures; 2 invalid input or environment; 130 interrupted.
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
    """Prints errors that the user can fix, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from solvers.ns import InvalidThetaError

        try:
            return super().invoke(ctx)
        except (UserError, InvalidThetaError) as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(USAGE)
        except KeyboardInterrupt:
            # Ray takes a second or two at exit to end its processes. A second Ctrl-C must not leave any behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            click.echo("interrupted; run the same command again to resume", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="bespoke-solvers", prog_name="bespoke")
def main() -> None:
    """Distil fast solvers for frozen diffusion and flow models.

    \b
    Start here:
      bespoke sweep sweeps/configs/digits.yaml     pairs, sweep, evaluation, report
      bespoke ui                                   browse the results in MLflow
      bespoke compare digits                       print the table again
    """


for _command in (
    *(pairs, sweep, evaluate, reference, register, compare, pretrain, distil_network),
    *(export, list_plugins, ui, doctor, cluster),
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
