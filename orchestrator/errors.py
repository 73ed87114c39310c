"""Errors that a user can cause and fix. The command line prints them without a traceback."""

from __future__ import annotations

import errno
import re
import sysconfig
import traceback
from pathlib import Path
from typing import NamedTuple

from orchestrator.uris import without_secrets


class UserError(Exception):
    """An input from the user cannot work; the message names the value and the remedy. It shows no secrets of URIs.

    Attributes:
        details: Text of the traceback, for the log, if the error comes from another process.
    """

    details = ""

    def __init__(self, message: str = ""):
        super().__init__(without_secrets(message))


class ConfigError(UserError):
    """The configuration is invalid; raised before any work starts."""


class StoreError(UserError):
    """Stored data cannot be used: it is damaged, mixed, busy, or on a full disk."""


class DamagedShardError(StoreError):
    """The bytes of a shard are not those that were written."""


class DamagedManifestError(StoreError):
    """A manifest is not the one that was written; its shards may be intact."""


class UnreachableStorageError(StoreError):
    """Remote storage did not answer, or refused the operation, even after retries."""


class BusyStoreError(StoreError):
    """Another process is using the store, and the caller chose not to wait."""


class PoolError(UserError):
    """No host could answer a request."""


class CodeError(UserError):
    """Code raised an exception that is not a :class:`UserError`: a network of the user's, or a plugin."""


class Failure(NamedTuple):
    """Why something failed: the reason in one line, and the traceback for the log."""

    reason: str
    details: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        reason = str(error) if isinstance(error, UserError) else describe(error)
        details = (isinstance(error, UserError) and error.details) or "".join(traceback.format_exception(error))
        return cls(" ".join(reason.split()), details)


LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

OUTSIDE = ("ray", "mlflow", "sqlalchemy", "requests", "urllib3", "grpc", "botocore", "aiohttp")
"""Packages whose exceptions come from services and machines."""


PRODUCT = tuple(f"{Path(__file__).parents[1] / name}/" for name in ("orchestrator", "solvers", "sweeps"))


RAISED = (Exception, SystemExit)
"""What code of the user's may raise. ``sys.exit`` in it must not end a host, which would be started again."""


def describe(error: BaseException, text: str | None = None, *, called: bool = False) -> str:
    """Type and message of an exception, with the line of code outside of libraries that raised it.

    Args:
        error: The exception.
        text: Its traceback as text, if the exception comes from another process.
        called: Whether the exception comes from code that the program calls; its own lines are then left out.
    """
    lines = "".join(traceback.format_tb(error.__traceback__)) if text is None else text
    own, frames = _frames(lines, called)
    shown = own if called else own or frames
    where = "{}, line {}, in {}: ".format(*shown[-1]) if shown else ""
    message = _message(error)
    if isinstance(error, SyntaxError) and error.filename:
        where, message = f"{error.filename}, line {error.lineno}: ", error.msg
    return f"{where}{type(error).__name__}" + (f": {message}" if message else "")


def is_users(error: BaseException) -> bool:
    """Whether an exception was raised in code of the user's, or by a library or a function that it called."""
    lines = "".join(traceback.format_tb(error.__traceback__))
    return isinstance(error, SyntaxError) or bool(_frames(lines, called=True)[0])


def _frames(lines: str, called: bool) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """File, line and function of the frames of a traceback outside of libraries, and of all frames."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', lines)
    others = (*LIBRARIES, "<", *(PRODUCT if called else ()))
    return [f for f in frames if not f[0].startswith(others) and "site-packages" not in f[0]], frames


REMEDIES = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "check the path: its links form a circle",
    errno.EEXIST: "name another place",
    errno.EADDRINUSE: "choose another port",
    errno.EIO: "check the device",
}
"""What to do about errors of the operating system."""


def _message(error: BaseException) -> str:
    """The message of an exception; of Ray's, which quote tracebacks, the last line."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines and "ray::" in lines[0] else "\n".join(lines)


def describe_outside(error: BaseException) -> str:
    """An error of a machine or a service in one line, with a remedy if there is a general one."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(_message(error).split()) or type(error).__name__
    name = "" if error.filename is None else f"{error.filename}: "
    remedy = REMEDIES.get(error.errno)
    return f"{name}{(error.strerror or str(error)).lower()}" + (f"; {remedy}" if remedy else "")


def may_pass(error: BaseException) -> bool:
    """Whether the same work may succeed if it is repeated: the cause is a machine or a service, not input or code."""
    if isinstance(error, UserError):
        return isinstance(error, UnreachableStorageError)
    if isinstance(error, OSError | MemoryError | EOFError) or type(error).__module__.partition(".")[0] in OUTSIDE:
        return True
    return "OutOfMemory" in type(error).__name__ or (isinstance(error, RuntimeError) and "CUDA" in str(error))
