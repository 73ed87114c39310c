"""``bespoke store``: what a storage holds, and the deletion of what no experiment needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from orchestrator.cli.shared import stored
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.results.inventory import Entry

# Imports of torch and pyarrow take seconds, so they stay inside the commands: --help and usage errors are instant.


@click.group()
def store() -> None:
    """Show what a storage holds and what needs it, and delete what nothing needs any more.

    Pairs, results and measurements are kept under names that depend on everything that decides them, and are used by
    every experiment that asks for the same. So a changed configuration leaves the earlier ones behind.

    \b
    Examples:
      bespoke store list
      bespoke store prune --unused
      bespoke store prune --older-format --yes --storage s3://bucket/bespoke
    """


@store.command(name="list")
@stored
def list_(storage: str) -> None:
    """List pair sets, and sums of results, states, measurements and references, with the experiments that need them.

    An experiment needs what its last commands used or made. What is of an older format was written by an earlier
    release, and is not read any more.
    """
    from orchestrator.results.inventory import age, inventory
    from orchestrator.storage import Storage
    from sweeps.point import RESULT_FORMAT

    place = Storage.at(storage)
    place.check_exists()
    entries = inventory(place, RESULT_FORMAT)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        name = entry.key if entry.kind == "pairs" else f"{entry.kind}*"
        groups.setdefault((name, _use(entry)), []).append(entry)
    for (name, use), members in groups.items():
        what = members[0].detail if members[0].kind == "pairs" else f"{len(members)} of this kind"
        click.echo(f"{name.removesuffix('*'):<28} {_size(members):>10}  {age(members[-1]):>10}  {use}; {what}")
    older, unused = [e for e in entries if e.older], [e for e in entries if e.is_unused and not e.older]
    click.echo(f"{place.shown}: {len(entries)} entries, {_size(entries)}")
    for count, option in ((older, "--older-format"), (unused, "--unused")):
        if count:
            click.echo(f"`bespoke store prune {option}` would delete {len(count)} of them, {_size(count)}")


@store.command()
@stored
@click.option("--unused", is_flag=True, help="What no experiment needs any more.")
@click.option("--older-format", is_flag=True, help="What an earlier release wrote; this one does not read it.")
@click.option("--forget", metavar="NAME", multiple=True, help="First drop this experiment: nothing is kept for it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--no-wait", is_flag=True, help="Fail immediately if an experiment is running; by default, wait for it.")
def prune(storage: str, unused: bool, older_format: bool, forget: tuple[str, ...], yes: bool, no_wait: bool) -> None:
    """Delete what no experiment needs, or what is of an older format. Shows it and its size first, and asks.

    Nothing is deleted while an experiment runs on this storage, nor what one has come to need since it was shown. Pairs
    made by your own programs belong to no experiment. Reports, published thetas and MLflow's runs are never deleted.
    """
    from orchestrator.progress import note
    from orchestrator.results import inventory
    from orchestrator.storage import Storage
    from sweeps.point import RESULT_FORMAT

    if not (unused or older_format):
        raise UserError("nothing to delete: give --unused, --older-format, or both")
    place = Storage.at(storage)
    place.check_exists()
    for name in forget:
        if not inventory.forget(place, name, announce=note):
            raise UserError(f"no experiment {name!r} has a record under {place.shown}; see `bespoke store list`")
    entries = inventory.inventory(place, RESULT_FORMAT)
    chosen = [e for e in entries if (older_format and e.older) or (unused and e.is_unused and not e.older)]
    for entry in chosen:
        click.echo(f"{entry.key}  {_size([entry])}  {_use(entry)}  {entry.detail}".rstrip())
    click.echo(f"{len(chosen)} of {len(entries)} entries, {_size(chosen)}")
    if not chosen:
        return
    if not yes:
        click.confirm(f"delete them from {place.shown}?", abort=True)
    deleted = inventory.prune(place, chosen, RESULT_FORMAT, wait=not no_wait, announce=note)
    click.echo(f"deleted {len(deleted)} entries, {_size(deleted)}")


def _use(entry: Entry) -> str:
    """The experiments that need an entry, or why nothing does."""
    if entry.older:
        return "older format"
    return ", ".join(entry.needed_by) or "no experiment"


def _size(entries: Sequence[Entry]) -> str:
    size = float(sum(entry.size for entry in entries))
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
