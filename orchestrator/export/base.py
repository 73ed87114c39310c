"""Interface of exporters, which write theta in the format of another program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import UserError
from orchestrator.storage import Storage
from solvers.theta import ThetaArtifact


class ExportError(UserError):
    """The destination is not valid for the export, or the target format cannot express the theta."""


class Exporter(ABC):
    """Writes a theta artifact in one format. Stateless: ``EXPORTER()`` creates an instance.

    Attributes:
        name: Module name, as passed to ``bespoke export --to``.
    """

    name: ClassVar[str]

    @abstractmethod
    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write ``artifact`` to ``destination``; an existing file is replaced.

        Args:
            artifact: The solver with its provenance.
            destination: A file or a folder, depending on the format.

        Returns:
            The files written.

        Raises:
            ExportError: The destination does not suit the format.
            InvalidThetaError: theta is not a valid solver.
        """


def check_artifact(artifact: ThetaArtifact) -> ThetaArtifact:
    """The artifact as read back from its own JSON, so that an artifact a loader would refuse is never exported.

    Raises:
        InvalidThetaError: theta holds a number that is not finite, a time outside [0, 1], or unusable provenance.
    """
    return ThetaArtifact.from_json(artifact.to_json(), origin="theta to be exported")


def write_file(destination: Path, suffix: str, data: bytes) -> list[Path]:
    """Write the file of a single-file format atomically.

    Raises:
        ExportError: The destination is a folder, or has another suffix.
        StoreError: The disk is full.
    """
    if destination.is_dir() or destination.suffix != suffix:
        raise ExportError(
            f"the export is one file that ends in {suffix}, but the destination is {destination}; write for example "
            f"{destination / ('theta' + suffix) if destination.is_dir() else destination.with_suffix(suffix)}"
        )
    Storage.at(destination.parent).write(destination.name, data)
    return [destination]
