"""Files that users bring: which files of a folder are data, and their text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

NOT_DATA = frozenset({"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"})
"""Names that systems and programs leave in folders, beside those that begin with a dot, such as ``._0.png``."""


def absolute(path: str) -> str:
    """The absolute form of a path, with ``~`` expanded. All other characters mean themselves.

    Raises:
        ValueError: The path is empty, no file can have it, or it is relative to a folder that does not exist.
    """
    if not path.strip():
        raise ValueError("is empty, as a variable is that is not set; give a path, or leave it out")
    if "\0" in path or any("\ud800" <= character <= "\udfff" for character in path):
        raise ValueError(f"is not a path: {path!r} has a character that is not UTF-8")
    try:
        return str(Path(os.path.expanduser(path)).absolute())
    except FileNotFoundError:
        raise ValueError(f"is {path!r}, in a current folder that does not exist any more; change to another") from None


def data_files(folder: Path, suffixes: Iterable[str], *, below: bool = True) -> list[Path]:
    """Files of a folder that are data, sorted by path; hidden files and those of :data:`NOT_DATA` are not.

    Args:
        folder: The folder.
        suffixes: Endings of the names, e.g. ``.png``; upper and lower case are equal.
        below: Whether to list the folders below it, too.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    paths = folder.rglob("*") if below else folder.glob("*")
    return sorted(
        path
        for path in paths
        if path.name.lower().endswith(endings) and is_data(path.relative_to(folder)) and not path.is_dir()
    )


def data_folders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted by name, without hidden ones and those of :data:`NOT_DATA`."""
    return sorted(path for path in folder.glob("*") if is_data(path.relative_to(folder)) and path.is_dir())


def is_data(path: Path) -> bool:
    """Whether no part of a relative path is hidden or of :data:`NOT_DATA`."""
    return not any(part.startswith(".") or part in NOT_DATA for part in path.parts)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; lines end in ``\\n``, and a byte order mark at its start is left out.

    Split it at ``\\n``: ``str.splitlines`` also splits at characters that are part of a line, such as U+2028.

    Raises:
        ValueError: The file is not UTF-8; names the line and the remedy.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        reason = f"has the byte 0x{data[error.start]:02x} in line {line}"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            reason = "is UTF-16"
        raise ValueError(f"{path} is not UTF-8 text: it {reason}; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
