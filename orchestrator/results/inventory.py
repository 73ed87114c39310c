"""What a storage holds, which experiment needs it, and the deletion of what none needs.

Every command records the folders that it needs under ``needs/``, before it uses them. Deletion holds the lock of these
records and of every experiment, so that nothing is deleted that a running command uses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.lock import exclusive
from orchestrator.pairs.spec import FORMAT as PAIRS_FORMAT
from orchestrator.progress import Note, counted
from orchestrator.storage import Storage

LOCK = "needs/.lock"
VERSION = re.compile(r"v([0-9]+)-")
DISTILLATIONS_FORMAT = 1
"""Incremented whenever equal settings of ``bespoke distil`` would give another theta."""

EXPERIMENTS = ("experiments", "network-distillation")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A folder of a storage that can be listed and deleted as a whole.

    Attributes:
        key: The folder.
        kind: 'pairs', 'result' (with theta), 'state' (of an unfinished distillation), 'distillation' (of `bespoke
            distil`), 'measurements' (of samples), 'reference' (measurements of real samples), 'trajectories' or
            'student'.
        detail: What a user recognises it by; may be empty.
        size: Bytes of its files.
        modified: Time of the last change of a file in it; None if unknown.
        needed_by: Experiments that need it.
        older: Whether it is of an older format, which no command reads any more.
    """

    key: str
    kind: str
    detail: str
    size: int
    modified: datetime | None
    needed_by: tuple[str, ...]
    older: bool

    @property
    def is_unused(self) -> bool:
        """Whether no experiment needs it."""
        return not self.needed_by


def record_needs(
    storage: Storage, experiment: str, command: str, folders: Iterable[str], *, add: bool, announce: Note
) -> None:
    """Record the folders that a command of an experiment needs. Waits while something is being deleted.

    Args:
        storage: The storage.
        experiment: Name of the experiment.
        command: Name of the command; each has its own record.
        folders: Keys of folders, such as ``pairs/v2-0123456789abcdef``.
        add: Whether those recorded earlier are still needed.
        announce: Receives a note if another process must be waited for.
    """
    key = f"needs/{experiment}/{command}.json"
    needed = set(folders)
    with exclusive(storage, LOCK, wait=True, announce=announce):
        recorded = set(storage.read_json(key)) if storage.exists(key) else set()
        if needed - recorded or (recorded - needed and not add):
            storage.write_json(key, sorted(needed | recorded if add else needed))


def note_older(storage: Storage, results_format: int, announce: Note) -> None:
    """Announce pair sets and results of an older format, which are not used, and what to do with them."""
    counts = [
        sum(_is_older(name, PAIRS_FORMAT) for name in storage.names("pairs")),
        sum(_is_older(name, results_format) for name in storage.names("points")),
    ]
    if any(counts):
        announce(
            f"{counts[0]} pair set(s) and {counts[1]} result(s) under {storage.shown} are of an older release and "
            f"are not used: what is needed is made anew, beside them. `bespoke store list` shows them, and `bespoke "
            f"store prune --older-format` deletes them"
        )


def inventory(storage: Storage, results_format: int) -> list[Entry]:
    """All entries of a storage, by kind and key.

    Args:
        storage: The storage.
        results_format: Present format of results.
    """
    needs = _needs(storage)
    formats = {"pairs": PAIRS_FORMAT, "measurements": PAIRS_FORMAT, "trajectories": PAIRS_FORMAT}
    formats["distillations"] = DISTILLATIONS_FORMAT
    entries = []
    for place in ("pairs", "points", "distillations", "measurements", "trajectories", "students"):
        for name, files in storage.tree(place).items():
            if name == "media":  # of an evaluation that is running or was killed, which deletes them itself
                continue
            key = f"{place}/{name}"
            names = {file.key.removeprefix(f"{key}/") for file in files}
            kind = _kind(place, name, names)
            needed = _owner(place, name)
            entries.append(
                Entry(
                    key=key,
                    kind=kind,
                    detail=_pairs_detail(storage, key) if kind == "pairs" else "",
                    size=sum(file.size for file in files),
                    modified=max((file.modified for file in files if file.modified), default=None),
                    needed_by=tuple(sorted(who for who, folders in needs.items() if {key, needed} & folders)),
                    older=kind not in ("reference", "student") and _is_older(name, formats.get(place, results_format)),
                )
            )
    return sorted(entries, key=lambda entry: (entry.kind, entry.key))


def prune(
    storage: Storage, entries: Sequence[Entry], results_format: int, *, wait: bool, announce: Note
) -> list[Entry]:
    """Delete entries, except those that an experiment has come to need meanwhile.

    Args:
        storage: The storage.
        entries: What to delete, from :func:`inventory`.
        results_format: Present format of results.
        wait: Whether to wait for experiments that are running.
        announce: Receives a note if one must be waited for.

    Returns:
        What was deleted.

    Raises:
        BusyStoreError: An experiment is running, and ``wait`` is false.
    """
    with ExitStack() as stack:
        for place in EXPERIMENTS:
            for name in storage.names(place):
                if name != "scores" and storage.is_folder(f"{place}/{name}"):
                    stack.enter_context(exclusive(storage, f"{place}/{name}/.lock", wait=wait, announce=announce))
        for entry in entries:
            if entry.kind in ("pairs", "measurements"):
                stack.enter_context(exclusive(storage, f"{entry.key}/.lock", wait=wait, announce=announce))
        stack.enter_context(exclusive(storage, LOCK, wait=wait, announce=announce))
        now = {entry.key: entry for entry in inventory(storage, results_format)}
        deleted = []
        for entry in entries:
            current = now.get(entry.key)
            if current is not None and set(current.needed_by) <= set(entry.needed_by):
                storage.delete_tree(entry.key)
                deleted.append(entry)
    return deleted


def forget(storage: Storage, experiment: str, *, announce: Note) -> bool:
    """Delete an experiment's record of what it needs; returns whether there was one."""
    with exclusive(storage, LOCK, wait=True, announce=announce):
        names = storage.names(f"needs/{experiment}")
        for name in names:
            storage.delete(f"needs/{experiment}/{name}")
        storage.delete_empty_folder(f"needs/{experiment}")
    return bool(names)


def _needs(storage: Storage) -> dict[str, set[str]]:
    """The folders that each experiment needs."""
    needs: dict[str, set[str]] = {}
    for experiment in storage.names("needs"):
        for name in storage.names(f"needs/{experiment}"):
            needs.setdefault(experiment, set()).update(storage.read_json(f"needs/{experiment}/{name}"))
    return needs


def _kind(place: str, name: str, files: Collection[str]) -> str:
    if place == "points":
        return "result" if "result.json" in files else "state"
    if place == "measurements" and any(file.startswith("real/") for file in files):
        return "reference"
    return {"students": "student", "distillations": "distillation"}.get(place, place)


def _owner(place: str, name: str) -> str:
    """The pair set that measurements of its samples or trajectories belong to."""
    version = VERSION.match(name)
    digest = "-".join(name.split("-")[:2]) if version else name.split("-")[0]
    return f"pairs/{digest}" if place in ("measurements", "trajectories") else f"{place}/{name}"


def _is_older(name: str, present: int) -> bool:
    """Whether a folder's name has an earlier format, or none, as in the first one."""
    version = VERSION.match(name)
    return version is None or int(version[1]) < present


def _pairs_detail(storage: Storage, key: str) -> str:
    """Count, guidance, conditioning and model of a pair set; says so if it is not complete."""
    manifest = f"{key}/manifest.json"
    if not storage.exists(manifest):
        return "not complete"
    try:
        content: dict[str, Any] = storage.read_json(manifest)
        spec, count = content["spec"], sum(shard["rows"] for shard in content["shards"])
        return (
            f"{counted(count, 'pair')}, guidance {spec['guidance_scale']:g}, {spec['conditioning']['name']}, "
            f"model {spec['model_digest'][:8]}"
        )
    except (ValueError, KeyError, TypeError):
        return "damaged manifest"


def age(entry: Entry) -> str:
    """Time since the last change, in words."""
    if entry.modified is None:
        return "?"
    seconds = max(0.0, (datetime.now(UTC) - entry.modified).total_seconds())
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return "now"
