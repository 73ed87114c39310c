"""The log of a command: tracebacks, and what Ray and MLflow print. Only ``--debug`` shows it on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import StoreError, UserError
from orchestrator.storage import Storage
from orchestrator.uris import without_secrets

LIBRARIES = ("ray", "mlflow", "alembic", "py.warnings")
"""Loggers of libraries that write to the log instead of the terminal."""

_VARIABLE = "BESPOKE_DEBUG"
_logger = logging.getLogger("bespoke")


def show_debug() -> None:
    """Show tracebacks and the output of libraries on the terminal, in this process and those that it starts."""
    os.environ[_VARIABLE] = "1"


def debugging() -> bool:
    """Whether :func:`show_debug` has been called."""
    return os.environ.get(_VARIABLE) == "1"


def record(name: str, details: str) -> None:
    """Write the details of a failure, e.g. a traceback, to the log."""
    _logger.error("%s\n%s", name, details)


class _Formatter(logging.Formatter):
    """Hides the secrets of URIs."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class CommandLog:
    """The log of one command, kept in the storage.

    Attributes:
        file: Where it is collected until the command ends.
    """

    def __init__(self, storage: Storage, key: str, file: Path):
        self.storage, self.key, self.file = storage, key, file

    @property
    def location(self) -> str | None:
        """Where it will be when the command ends; None if nothing has been logged."""
        return self.storage.location(self.key) if self.file.stat().st_size else None

    def save(self) -> None:
        """Write the log to the storage, or delete that of an earlier command if nothing has been logged."""
        if self.location is not None:
            self.storage.write(self.key, self.file.read_bytes())
        elif self.storage.exists(self.key):
            self.storage.delete(self.key)


@contextmanager
def logged_to(storage: Storage, key: str) -> Iterator[CommandLog]:
    """Collect the log of this process while the context is open, and write it to the storage.

    Args:
        storage: Storage root.
        key: Key of the log.
    """
    loggers = [logging.getLogger(name) for name in (_logger.name, *LIBRARIES)]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    logging.captureWarnings(True)
    with tempfile.TemporaryDirectory() as folder:
        log = CommandLog(storage, key, Path(folder) / "log")
        handler = logging.FileHandler(log.file, encoding="utf-8")
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers: list[logging.Handler] = [handler, *([logging.StreamHandler(sys.stderr)] if debugging() else [])]
        for logger in loggers:
            logger.handlers, logger.propagate = list(handlers), False
        try:
            yield log
        except Exception as error:
            if not isinstance(error, UserError):
                record("the command failed", "".join(traceback.format_exception(error)))
            raise
        finally:
            logging.captureWarnings(False)
            for logger, (old_handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = old_handlers, propagate
            handler.close()
            with suppress(StoreError):  # the command's own error is the one to show
                log.save()
