"""What a Ray of ours takes from the surroundings of the command: the import path of its workers, and its folder."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ray.job_config import JobConfig

from orchestrator.errors import PoolError
from orchestrator.importing import STARTED_WITH

SOCKET_BYTES = 103
"""Length limit of a socket's path on every platform; Linux allows 107."""

LONGEST_NAME = "/ray/session_2026-01-01_00-00-00_000000_9999999/sockets/plasma_store.1"
"""The longest path of a socket in the folder for temporary files; the number is that of the process."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def import_path(started_with: Sequence[str] = STARTED_WITH) -> list[str]:
    """The folders from which this process imports before the standard library: its script's, and PYTHONPATH's.

    The current folder is among them only if Python was started so that it imports from there, as by ``python -m``.
    """
    library = sysconfig.get_path("stdlib")
    folders = []
    for entry in started_with:
        if entry == library or os.path.basename(entry) == os.path.basename(library).replace(".", "") + ".zip":
            break
        folders.append(os.path.abspath(entry))
    return folders


class WorkerPath(JobConfig):  # type: ignore[misc]  # ray has no types
    """Lets workers import what the driver imports.

    Ray puts the driver's current folder in front of every worker's import path, although a driver that is started as a
    command does not import from there. A folder ``solvers`` in it would replace the installed package in the workers.
    """

    def __init__(self) -> None:
        # A worker puts each folder in front of the others, so the last of the list comes first.
        super().__init__(_py_driver_sys_path=import_path()[::-1])

    def _runtime_env_has_working_dir(self) -> bool:
        """Ray's condition for leaving out the current folder: the job brings its own path."""
        return True


def ray_folder() -> str | None:
    """A folder in which a local Ray can make its sockets; None for Ray's own choice.

    Ray takes RAY_TMPDIR, TMPDIR or /tmp. The path of a socket is limited to about 100 bytes, and Ray's to ASCII, which
    a job's own TMPDIR on a cluster may not satisfy; then a short folder of the system is taken.

    Raises:
        PoolError: No folder is short enough and writable.
    """
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT_FOLDERS[0]
    if _fits(chosen):
        return None
    for folder in SHORT_FOLDERS:
        if _fits(folder) and Path(folder).is_dir() and os.access(folder, os.W_OK):
            return f"{folder}/ray-{os.getuid()}"
    raise PoolError(
        f"Ray cannot make sockets in {chosen!r}, which is too long or not ASCII, nor in {' or '.join(SHORT_FOLDERS)}"
        f"; set TMPDIR to a folder with a path of at most {SOCKET_BYTES - len(LONGEST_NAME)} ASCII characters"
    )


def _fits(folder: str) -> bool:
    return folder.isascii() and len(os.path.abspath(folder)) + len(LONGEST_NAME) <= SOCKET_BYTES
